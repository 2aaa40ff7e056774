"""The two command-line tools, run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def run_tool(name, *words):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, f"tools/{name}.py", *map(str, words)]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def words(corpus, model_file, tmp_path):
    return {
        "--input": corpus,
        "--tokenizer": model_file,
        "--output": tmp_path / "out",
        "--train-tokens": "4K",
        "--long-threshold": 300,
        "--short-keep-ratio": 0.5,
        "--valid-tokens-per-source": "1K",
    }


def flags(words):
    return [word for pair in words.items() for word in pair]


def test_make_inspect_plot_and_refuse_to_overwrite(words, tmp_path):
    made = run_tool("preprocess_mix", *flags(words))
    assert made.returncode == 0, made.stderr
    assert "4,000 training tokens" in made.stdout
    assert [line.split()[0] for line in made.stdout.splitlines()[1:5]] == [
        "Book",
        "C4",
        "GitHub",
        "all",
    ]
    again = run_tool("preprocess_mix", *flags(words))
    assert again.returncode == 2
    assert "exists already" in again.stderr
    assert run_tool("preprocess_mix", *flags(words), "--force").returncode == 0
    plot = tmp_path / "figure.png"
    shown = run_tool("inspect_dataset", "--dataset", words["--output"], "--plot", plot, "--verify")
    assert shown.returncode == 0, shown.stderr
    assert set(made.stdout.splitlines()[1:5]) <= set(shown.stdout.splitlines())
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.png", "out"]


def test_dry_run_prints_the_table_and_writes_nothing(words, tmp_path):
    result = run_tool("preprocess_mix", *flags(words), "--dry-run", "--source-shares", "natural")
    assert result.returncode == 0, result.stderr
    assert "dry run" in result.stdout
    assert "4,000" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--input": "/nowhere/a.jsonl"}, "--input /nowhere/a.jsonl does not exist"),
        ({"--tokenizer": "/nowhere/t.model"}, "--tokenizer /nowhere/t.model: no tokenizer there"),
        ({"--train-tokens": "5X"}, "--train-tokens '5X' is not a number of tokens"),
        ({"--train-tokens": "5B"}, "--train-tokens 5000000000 is more than the corpus can fill"),
        ({"--source-shares": "slimpajama"}, "names CommonCrawl, Wikipedia, ArXiv"),
        ({"--source-shares": "/nowhere.yaml"}, "--source-shares /nowhere.yaml does not exist"),
        ({"--source-key": "meta.none"}, "a.jsonl:1 has no source"),
        ({"--strategy": "best"}, "--strategy best: choose one of per-source"),
    ],
)
def test_errors_are_one_paragraph_and_status_2(changes, message, words, tmp_path):
    result = run_tool("preprocess_mix", *flags(words | changes))
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    # What was read so far is kept, for the same command; not if that can never end well.
    kept = ["out.work"] if "--source-key" in changes else []
    assert [path.name for path in tmp_path.iterdir()] == kept


def test_inspect_refuses_what_is_no_dataset(tmp_path):
    result = run_tool("inspect_dataset", "--dataset", tmp_path)
    assert result.returncode == 2
    assert "is no dataset" in result.stderr
