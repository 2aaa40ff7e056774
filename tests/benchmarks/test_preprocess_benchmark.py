"""The benchmark runs and compares tokens; how fast anything is, is no matter of tests."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.open_dataset import write_sparse
from benchmarks.preprocess import Cost, make_slices, speed
from megatron_long.dataset.indexed import IndexedDatasetReader

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents of two sources, of real words, with literal special tokens here and there."""
    folder, generator = tmp_path_factory.mktemp("corpus"), random.Random(0)
    words = (REPOSITORY / "LICENSE").read_text("utf-8").split()
    for name in ("RedPajamaBook", "RedPajamaC4"):
        rows = []
        for number in range(60):
            text = " ".join(generator.choices(words, k=generator.randint(5, 900)))
            text += "</s>" if number % 7 == 0 else "\n"
            rows.append({"text": text, "meta": {"redpajama_set_name": name}})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, "utf-8")
    return folder


@pytest.fixture(scope="module")
def model_file(corpus, tmp_path_factory):
    import sentencepiece

    prefix = tmp_path_factory.mktemp("model") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        input=str(REPOSITORY / "LICENSE"),
        model_prefix=str(prefix),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.mark.slow
def test_contenders_give_the_same_tokens(corpus, model_file, tmp_path):
    pytest.importorskip("datatrove")
    output = tmp_path / "result.json"
    words = ["--input", corpus, "--tokenizer", model_file, "--output", output, "--megabytes", 1]
    words += ["--contenders", "ours,ours_mixture,datatrove,engine,reference", "--rounds", 1]
    words += ["--open-tokens", "10M", "--work-dir", tmp_path / "work"]
    result = subprocess.run(
        [sys.executable, "benchmarks/preprocess.py", *map(str, words)],
        cwd=REPOSITORY,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    told = json.loads(output.read_text("utf-8"))
    assert set(told["speeds"]) == {"ours", "ours_mixture", "datatrove", "engine", "reference"}
    assert all(row["documents_different"] == 0 for row in told["speeds"].values())
    assert told["opening"]["tokens"] == 10_000_000
    assert told["text_bytes"] >= 1_000_000


def test_speed_leaves_out_what_both_runs_share():
    runs = [[Cost(3.0, 4.0, 5, 6, ""), Cost(12.0, 22.0, 7, 8, "")]]
    runs.append([Cost(4.0, 5.0, 5, 6, ""), Cost(13.0, 23.0, 7, 8, "")])
    told = speed(runs, 10_000_000, 100_000_000)
    assert told["cpu_mb_s"] == pytest.approx(10)
    assert told["wall_mb_s"] == pytest.approx(5)
    assert told["start_cpu_s"] == pytest.approx(2)


def test_a_small_slice_begins_a_large_one(corpus, tmp_path):
    small, large = make_slices([corpus], [20_000, 300_000], tmp_path)
    assert small.text_bytes >= 20_000
    assert large.text_bytes >= 300_000
    assert large.path.read_bytes().startswith(small.path.read_bytes())
    assert large.num_documents == len(large.path.read_bytes().splitlines())


def test_sparse_dataset_has_the_tokens_asked(tmp_path):
    count = write_sparse(tmp_path / "train", 3_000_000)
    reader = IndexedDatasetReader(tmp_path / "train")
    assert len(reader) == count
    assert reader.num_tokens == int(np.sum(reader.lengths)) == 3_000_000
    assert (tmp_path / "train.bin").stat().st_blocks * 512 < 1_000_000
