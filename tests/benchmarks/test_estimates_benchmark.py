import re
import sys

from benchmarks import estimates


def test_a_small_corpus_of_that_shape(monkeypatch, capsys):
    monkeypatch.setattr(estimates, "NUM_FILES", 60)
    words = ["estimates.py", "--draws", "1", "--documents", "60", "--text-mb", "0.2"]
    monkeypatch.setattr(sys, "argv", words)
    estimates.main()
    told = capsys.readouterr().out
    assert told.startswith("60 files")
    assert told.count("holds the truth in") >= 7
    assert float(re.search(r"all: ([0-9.]+)", told)[1]) > 0.6
