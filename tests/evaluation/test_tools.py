"""The two tools from the command line, with a model of known answers in place of Megatron's."""

import fcntl
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_long.cli import run_tool
from megatron_long.dataset.indexed import IndexedDatasetReader
from megatron_long.dataset.manifest import read_manifest
from megatron_long.evaluation import scoring
from megatron_long.evaluation.loss.loss_report import read_loss_report
from megatron_long.evaluation.needle.needle_report import read_needle_report
from megatron_long.job import rendezvous
from megatron_long.tokenizer.loading import load_tokenizer

from .fakes import (
    FakeScorer,
    copy_predictions,
    make_story,
    write_checkpoint_folder,
)

REPOSITORY = Path(__file__).resolve().parents[2]
RunTool = Callable[..., int]


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_dataset: Path) -> Path:
    manifest = read_manifest(tiny_dataset)
    path = write_checkpoint_folder(tmp_path / "ckpt", manifest.tokenizer.vocab_size)
    shutil.copytree(tiny_dataset / "tokenizer", path / "tokenizer")
    return path


@pytest.fixture
def haystack(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(make_story(300))
    return path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Let `open_scorer` give a copying model, and record how it was called."""
    calls: list[dict] = []

    def open_scorer(checkpoint: Path, **settings) -> FakeScorer:
        calls.append({"checkpoint": checkpoint, **settings})
        return FakeScorer(copy_predictions, settings["context_length"])

    monkeypatch.setattr(scoring, "open_scorer", open_scorer)
    return calls


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> RunTool:
    """Run a tool in this process: `run("loss", *flags)` gives its exit status."""

    def run_with(name: str, *flags: object) -> int:
        module = importlib.import_module(f"megatron_long.commands.evaluate_{name}")
        monkeypatch.setattr(sys, "argv", [f"evaluate_{name}.py", *map(str, flags)])
        try:
            return run_tool(module.main)
        except SystemExit as stop:
            return int(stop.code or 0)

    return run_with


def loss_flags(checkpoint: Path, dataset: Path, output: Path) -> list[object]:
    return ["--checkpoint", checkpoint, "--dataset", dataset, "--output", output]


def test_loss(run, opened, checkpoint, tiny_dataset, tmp_path, capsys):
    output, plot = tmp_path / "out" / "loss.json", tmp_path / "out" / "loss.png"
    flags = loss_flags(checkpoint, tiny_dataset, output)
    layout = ["--tensor-model-parallel-size", "2", "--context-parallel-size", "2"]
    status = run(
        "loss", *flags, "--context-length", 128, "--plot", plot, "--micro-batch-size", 3, *layout
    )
    assert status == 0
    assert {"--buckets", "--context-length"} < set(opened[0].pop("tool_flags"))
    assert opened == [
        {
            "checkpoint": checkpoint,
            "context_length": 128,
            "megatron_argv": layout,
            "precision": None,
            "hf_config": None,
            "check_hashes": True,
            "iteration": "10",
            "weights": "auto",
            "kind": scoring.Scorer,
        }
    ]
    report = read_loss_report(output)
    assert report.settings.buckets == ((0, 16), (16, 128))
    assert report.settings.iteration == "10"
    manifest = read_manifest(tiny_dataset)
    assert report.settings.dataset_fingerprint == manifest.fingerprint
    for source in ("Book", "GitHub"):
        lengths = IndexedDatasetReader(tiny_dataset / "valid" / source).lengths
        expected = sum(min(int(length) - 1, 128) for length in lengths)
        assert report.loss.num_tokens(0, 128, source) == expected
        assert report.loss.num_documents[source] == len(lengths)
    assert plot.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "16-128" in printed
    assert str(output) in printed


def test_one_process_takes_an_odd_length(run, opened, checkpoint, tiny_dataset, tmp_path):
    flags = loss_flags(checkpoint, tiny_dataset, tmp_path / "loss.json")
    assert run("loss", *flags, "--context-length", 63) == 0
    assert read_loss_report(tmp_path / "loss.json").loss.edges[-1] == 63


def test_reports_of_one_name_are_told_apart(
    run, opened, checkpoint, tiny_dataset, tmp_path, capsys
):
    earlier = [tmp_path / name / "loss.json" for name in ("a", "b")]
    for path in earlier:
        flags = loss_flags(checkpoint, tiny_dataset, path)
        assert run("loss", *flags, "--context-length", 64) == 0
    flags = loss_flags(checkpoint, tiny_dataset, tmp_path / "c.json")
    assert run("loss", *flags, "--context-length", 64, "--compare", *earlier) == 0
    rows = (tmp_path / "c-table.csv").read_text().splitlines()[1:]
    assert {row.split(",")[1] for row in rows} == {"a/loss", "b/loss", "this model"}


def test_hashes_are_not_compared_on_request(run, opened, checkpoint, tiny_dataset, tmp_path):
    flags = loss_flags(checkpoint, tiny_dataset, tmp_path / "loss.json")
    assert run("loss", *flags, "--context-length", 64, "--skip-hash-check") == 0
    assert opened[0]["check_hashes"] is False


def test_loss_of_texts(run, opened, checkpoint, tiny_dataset, haystack, tmp_path, capsys):
    """Rows of a text instead of a dataset; reports of the two are never compared."""
    output = tmp_path / "text.json"
    flags = ["--checkpoint", checkpoint, "--text", haystack, "--context-length", 64]
    assert run("loss", *flags, "--max-documents-per-source", 3, "--output", output) == 0
    report = read_loss_report(output)
    assert report.loss.num_documents == {"story": 3}
    assert report.loss.num_tokens(0, 64) == 3 * 64
    flags = [*loss_flags(checkpoint, tiny_dataset, tmp_path / "b.json"), "--context-length", 64]
    assert run("loss", *flags, "--max-documents-per-source", 3, "--compare", output) == 2
    assert "only losses on the" in capsys.readouterr().err
    flags = ["--checkpoint", checkpoint, "--text", haystack, "--max-documents-per-source", 3]
    flags += ["--output", tmp_path / "longer.json", "--buckets", "0-8,8-64", "--compare", output]
    assert run("loss", *flags, "--context-length", 128) == 2  # rows cut elsewhere
    assert "--text with --context-length" in " ".join(capsys.readouterr().err.split())
    both = ["--dataset", tiny_dataset, "--text", haystack, "--checkpoint", checkpoint]
    assert run("loss", *both, "--context-length", 64, "--output", tmp_path / "c.json") == 2


def test_loss_against_an_earlier_run(run, opened, checkpoint, tiny_dataset, tmp_path, capsys):
    before = tmp_path / "before.json"
    common = ["--context-length", 64, "--buckets", "0-10,10-64"]
    assert run("loss", *loss_flags(checkpoint, tiny_dataset, before), *common) == 0
    after = loss_flags(checkpoint, tiny_dataset, tmp_path / "after.json")
    assert run("loss", *after, *common, "--compare", before, "--plot", tmp_path / "a.png") == 0
    table = capsys.readouterr().out
    assert "Loss of before in nats per token, and differences to it" in table
    assert "+0.0000" in table
    assert "+0.0000*" not in table
    assert (tmp_path / "after-table.png").stat().st_size > 5_000
    lines = (tmp_path / "after-table.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2 * 3  # buckets, models, sources and all
    other = [*after, "--context-length", 48, "--buckets", "0-32,32-48", "--compare", before]
    assert run("loss", *other, "--plot", tmp_path / "a.png", "--force") == 2
    assert "no position edges [48]" in " ".join(capsys.readouterr().err.split())
    other = [*after, "--context-length", 64, "--buckets", "0-32,32-64", "--compare", before]
    assert run("loss", *other, "--plot", tmp_path / "a.png", "--force") == 0  # other curve cells
    capsys.readouterr()
    assert run("loss", *after, *common, "--compare", before) == 2
    assert "--force" in capsys.readouterr().err
    flags = [*after, "--context-length", 64, "--compare", before, "--force"]
    assert run("loss", *flags, "--min-document-tokens", 20) == 2
    assert "--min-document-tokens" in capsys.readouterr().err


def test_needle(run, opened, checkpoint, haystack, tmp_path, capsys):
    output = tmp_path / "needle"
    flags = ["--checkpoint", checkpoint, "--haystack", haystack, "--output-dir", output]
    grid = ["--context-length", 900, "--num-lengths", 3, "--min-length", 600, "--num-depths", 4]
    assert run("needle", *flags, *grid, "--training-length", 700, "--rotary-base", "9") == 0
    assert opened[0]["context_length"] == 900
    assert opened[0]["megatron_argv"] == ["--rotary-base", "9"]
    report = read_needle_report(output / "needle.json")
    assert [(r.context_length, r.depth) for r in report.results][::4] == [
        (600, 0.0), (750, 0.0), (900, 0.0),
    ]  # fmt: skip
    assert len(report.results) == 12
    assert report.settings.iteration == "10"
    means = json.loads((output / "needle.json").read_text())["means"]
    assert means["within"]["num_cells"] == 4
    assert means["beyond"]["num_cells"] == 8
    assert (output / "needle.png").stat().st_size > 10_000
    assert "beyond 700" in capsys.readouterr().out
    lengths = ["--context-lengths", 620, 610, "--num-depths", 1]
    assert run("needle", *flags, *lengths) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "holds results of another command" in error
    assert 'megatron_argv ["--rotary-base", "9"] there, [] here' in error
    assert "context_lengths [600, 750, 900] there, [610, 620] here" in error
    assert "--force" in error
    assert run("needle", *flags, *lengths, "--force") == 0
    assert opened[-1]["context_length"] == 620
    report = read_needle_report(output / "needle.json")
    assert [(r.context_length, r.depth) for r in report.results] == [(610, 0.5), (620, 0.5)]


def needle_flags(checkpoint, haystack, output) -> list[object]:
    grid = ["--context-length", 900, "--num-lengths", 3, "--min-length", 600, "--num-depths", 4]
    return ["--checkpoint", checkpoint, "--haystack", haystack, "--output-dir", output, *grid]


def test_a_stopped_needle_run_goes_on_and_gives_the_same(
    run, monkeypatch, checkpoint, haystack, tmp_path, capsys
):
    """The first run is killed in its third batch, the second is stopped by its time limit."""
    scorers: list[FakeScorer] = []

    class Killed(FakeScorer):
        def score(self, tokens, labels):
            if len(scorers) == 1 and len(self.shapes) == 2:
                raise KeyboardInterrupt
            return super().score(tokens, labels)

    def open_scorer(checkpoint, *, context_length, **settings):
        scorers.append(Killed(copy_predictions, context_length))
        return scorers[-1]

    monkeypatch.setattr(scoring, "open_scorer", open_scorer)
    flags = needle_flags(checkpoint, haystack, tmp_path / "n")
    assert run("needle", *flags) == 130
    cells = tmp_path / "n" / "cells.jsonl"
    assert len(cells.read_text().splitlines()) == 1 + 2
    assert not (tmp_path / "n" / "needle.json").exists()
    with cells.open("a") as file:  # the kill cut a line short
        file.write('{"context_length": 9')
    assert run("needle", *flags, "--stop-after-minutes", 0) == 0
    assert scorers[1].shapes == []
    report = json.loads((tmp_path / "n" / "needle.json").read_text())
    assert not report["is_complete"]
    assert len(report["cells"]) == 2
    assert "10 cells left" in capsys.readouterr().out
    assert run("needle", *flags, "--context-parallel-size", 2) == 0  # another layout may go on
    assert sum(rows for rows, _ in scorers[2].shapes) == 10
    whole = tmp_path / "whole"
    assert run("needle", *needle_flags(checkpoint, haystack, whole)) == 0
    again = json.loads((whole / "needle.json").read_text())
    report = json.loads((tmp_path / "n" / "needle.json").read_text())
    assert report["is_complete"]
    assert report["cells"] == again["cells"]
    assert run("needle", *flags) == 0  # nothing is left: no model is loaded
    assert len(scorers) == 4


@pytest.mark.parametrize(
    "changed", [["--question", "What now?"], ["--answer", "Dolores Park on a sunny day."]]
)
def test_another_question_or_answer_is_another_command(
    changed, run, opened, checkpoint, haystack, tmp_path, capsys
):
    flags = needle_flags(checkpoint, haystack, tmp_path / "n")
    assert run("needle", *flags) == 0
    assert run("needle", *flags, *changed) == 2
    assert "results of another command (tasks" in " ".join(capsys.readouterr().err.split())
    assert len(opened) == 1


def test_needles_of_an_edited_file_are_another_command(run, opened, checkpoint, haystack, tmp_path):
    needles = tmp_path / "needles.json"
    hidden = {"needle": "The cat sleeps on the roof.", "question": "Where?", "answer": "the roof."}
    needles.write_text(json.dumps([hidden]))
    flags = [*needle_flags(checkpoint, haystack, tmp_path / "n"), "--needles", needles]
    assert run("needle", *flags) == 0
    needles.write_text(json.dumps([hidden | {"question": "Where does it sleep?"}]))
    assert run("needle", *flags) == 2


@pytest.mark.parametrize("file", ["hashes.json", "weights.distcp"])
def test_other_weights_at_the_same_path_are_another_command(
    file, run, opened, checkpoint, haystack, tmp_path, capsys
):
    weights = checkpoint / "iter_0000010" / file
    weights.write_text("{}")
    flags = needle_flags(checkpoint, haystack, tmp_path / "n")
    assert run("needle", *flags, "--skip-hash-check") == 0
    weights.write_text("{ }")
    assert run("needle", *flags, "--skip-hash-check") == 2
    assert "another command (weights_sha256" in " ".join(capsys.readouterr().err.split())


def test_damaged_cells_are_scored_again(run, opened, checkpoint, haystack, tmp_path, caplog):
    flags = needle_flags(checkpoint, haystack, tmp_path / "n")
    assert run("needle", *flags) == 0
    cells, report = tmp_path / "n" / "cells.jsonl", tmp_path / "n" / "needle.json"
    whole = json.loads(report.read_text())["cells"]
    lines = cells.read_bytes().splitlines(keepends=True)
    lines[2:5] = [b"\xff\0\n", b'{"context_length": 900, "colour": 1}\n', b"[]\n"]
    lines[5] = lines[5].replace(b'"seed": 0', b'"seed": []')
    cells.write_bytes(b"".join(lines))
    assert run("needle", *flags) == 0
    assert "4 of 12 lines are damaged" in caplog.text
    assert len(opened) == 2
    assert json.loads(report.read_text())["cells"] == whole


def test_a_full_disk_says_what_is_kept(
    run, opened, monkeypatch, checkpoint, haystack, tmp_path, capsys
):
    from megatron_long.evaluation import progress_log

    def fail(path, text):
        raise OSError(28, "No space left on device")

    flags = needle_flags(checkpoint, haystack, tmp_path / "n")
    with monkeypatch.context() as patch:
        patch.setattr(progress_log, "append_whole", fail)
        assert run("needle", *flags) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "cells.jsonl cannot be written (No space left on device)" in message
    assert "the same command resumes" in message
    assert run("needle", *flags) == 0


def test_a_second_job_in_the_same_folder_is_refused(
    run, opened, checkpoint, haystack, tmp_path, capsys
):
    (tmp_path / "n").mkdir()
    flags = needle_flags(checkpoint, haystack, tmp_path / "n")
    with open(tmp_path / "n" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run("needle", *flags) == 2
        assert run("needle", *flags, "--dry-run") == 0
    assert "another job is writing" in " ".join(capsys.readouterr().err.split())
    assert opened == []
    assert run("needle", *flags) == 0


def test_needle_tasks_and_seeds(run, opened, checkpoint, haystack, tmp_path, capsys):
    needles = tmp_path / "needles.json"
    hidden = {"needle": "The cat sleeps on the roof.", "question": "Where?", "answer": "the roof."}
    needles.write_text(json.dumps([hidden, {**hidden, "name": "second"}]))
    flags = needle_flags(checkpoint, haystack, tmp_path / "n")
    flags += ["--tasks", "sentence", "passkey", "--needles", needles, "--num-seeds", 2]
    assert run("needle", *flags) == 0
    report = json.loads((tmp_path / "n" / "needle.json").read_text())
    assert set(report["means_by_task"]) == {"needle-1", "second", "passkey"}
    assert len(report["cells"]) == 3 * 2 * 12
    for task in report["means_by_task"]:
        assert (tmp_path / "n" / f"needle-{task}.png").stat().st_size > 10_000
    assert "passkey" in capsys.readouterr().out


def test_a_dry_run_counts_the_work_and_loads_nothing(
    run, opened, checkpoint, haystack, tmp_path, capsys
):
    assert run("needle", *needle_flags(checkpoint, haystack, tmp_path / "n"), "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "0 of 12 cells are done" in printed
    assert "FLOPs" in printed
    assert opened == []
    assert not (tmp_path / "n").exists()


def test_a_dry_run_parses_the_flags_for_megatron(
    run, opened, checkpoint, haystack, tmp_path, capsys
):
    flags = [*needle_flags(checkpoint, haystack, tmp_path / "n"), "--dry-run"]
    assert run("needle", *flags, "--context-paralel-size", 2) == 2
    assert "did you mean --context-parallel-size?" in " ".join(capsys.readouterr().err.split())
    assert run("needle", *flags, "--context-parallel-size", 2) == 0
    assert opened == []


def test_random_weights_need_a_config(run, opened, checkpoint, haystack, tmp_path, capsys):
    flags = needle_flags(checkpoint, haystack, tmp_path / "n")[2:]
    config = checkpoint / "hf_config.json"
    assert run("needle", *flags, "--random-weights") == 2
    assert run("needle", *flags) == 2
    assert run("needle", *flags, "--random-weights", "--hf-config", "nowhere") == 2
    assert "--hf-config nowhere does not exist" in capsys.readouterr().err
    model = ["--random-weights", "--hf-config", config]
    assert run("needle", *flags, *model, "--checkpoint", checkpoint) == 2
    assert run("needle", *flags, *model, "--tokenizer", checkpoint / "tokenizer") == 0
    assert opened[0]["checkpoint"] is None
    assert opened[0]["hf_config"] == config


@pytest.mark.parametrize("tool", ["loss", "needle"])
def test_a_length_beyond_rope_is_measured_with_a_warning(
    tool, run, opened, checkpoint, tiny_dataset, haystack, tmp_path, caplog
):
    config = json.loads((checkpoint / "hf_config.json").read_text())
    (checkpoint / "hf_config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 100})
    )
    flags = needle_flags(checkpoint, haystack, tmp_path / "n")
    if tool == "loss":
        flags = loss_flags(checkpoint, tiny_dataset, tmp_path / "l.json")
        flags += ["--context-length", 128]
    assert run(tool, *flags) == 0
    assert "beyond the 100 tokens" in caplog.text


def test_only_the_writer_writes(
    run, monkeypatch, checkpoint, haystack, tiny_dataset, tmp_path, capsys
):
    def open_scorer(checkpoint, *, context_length, **settings):
        scorer = FakeScorer(copy_predictions, context_length)
        scorer.is_writer = False
        return scorer

    monkeypatch.setattr(scoring, "open_scorer", open_scorer)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(rendezvous, "agree", lambda found: ["", ""])  # rank 0 found no log
    flags = loss_flags(checkpoint, tiny_dataset, tmp_path / "loss.json")
    assert run("loss", *flags, "--context-length", 64) == 0
    flags = ["--checkpoint", checkpoint, "--haystack", haystack, "--output-dir", tmp_path / "n"]
    assert run("needle", *flags, "--context-lengths", 600, "--num-depths", 2) == 0
    assert not (tmp_path / "loss.json").exists()
    assert not (tmp_path / "n").exists()
    assert capsys.readouterr().out == ""


LOSS_ERRORS = {
    "missing checkpoint": (["--checkpoint", "nowhere"], "--checkpoint nowhere does not exist"),
    "missing dataset": (["--dataset", "nowhere"], "--dataset nowhere is not a folder"),
    "not a dataset": (["--dataset", "."], "has no manifest.json"),
    "odd length": (
        ["--context-length", "63", "--tensor-model-parallel-size", "2"],
        "use 62 or 64",
    ),
    "cp": (
        ["--context-length", "66", "--context-parallel-size", "2"],
        "--context-length 66 is not a multiple of 2 * --context-parallel-size 2 (4); use 64 or 68",
    ),
    "cp with equals": (["--context-length", "6", "--context-parallel-size=4"], "use 8 or more"),
    "cp not a number": (["--context-parallel-size", "two"], "not a positive integer"),
    "zero length": (["--context-length", "0"], "'0' is not a length of 1 token or more"),
    "buckets": (["--buckets", "0-99"], "--buckets 0-99 does not lie within --context-length 64"),
    "long documents": (["--min-document-tokens", "99999"], "no held-out document is that long"),
    "compare": (["--compare", "nowhere.json"], "--compare nowhere.json is not a file"),
    "no such iteration": (["--ckpt-step", "7"], "iter_0000007 is missing); there: 10"),
    "missing tokenizer": (["--tokenizer", "nowhere"], "--tokenizer nowhere does not exist"),
    "output is a folder": (["--output", ".", "--force"], "--output . cannot be written"),
}


@pytest.mark.parametrize("name", LOSS_ERRORS)
def test_loss_errors(name, run, opened, checkpoint, tiny_dataset, tmp_path, capsys):
    flags, message = LOSS_ERRORS[name]
    standard = loss_flags(checkpoint, tiny_dataset, tmp_path / "loss.json")
    assert run("loss", *standard, "--context-length", 64, *flags) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert opened == []
    assert not (tmp_path / "loss.json").exists()


def test_a_changed_byte_of_held_out_documents_is_found(
    run, opened, checkpoint, tiny_dataset, tmp_path, capsys
):
    dataset = tmp_path / "data"
    shutil.copytree(tiny_dataset, dataset)
    path = dataset / "valid" / "Book.bin"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    standard = loss_flags(checkpoint, dataset, tmp_path / "loss.json")
    assert run("loss", *standard, "--context-length", 64) == 2
    assert "valid/Book.bin is damaged" in " ".join(capsys.readouterr().err.split())
    assert opened == []


NEEDLE_ERRORS = {
    "missing checkpoint": (["--checkpoint", "nowhere"], "--checkpoint nowhere does not exist"),
    "missing haystack": (["--haystack", "nowhere.txt"], "--haystack nowhere.txt is not a file"),
    "long": (["--context-length", "100000"], "it can do lengths up to"),
    "short": (["--context-lengths", "20"], "--context-lengths above"),
    "above": (["--context-lengths", "620"], "--context-lengths 620 is above --context-length 600"),
    "odd length": (
        ["--context-length", "601", "--context-parallel-size", "2"],
        "use 600 or 604",
    ),
    "no such hf model": (["--backend", "hf", "--checkpoint", "."], "holds no config.json"),
    "hf with Megatron's flags": (
        ["--backend", "hf", "--bf16"],
        "--backend hf does not know --bf16",
    ),
    "needles": (["--needles", "nowhere.json"], "--needles nowhere.json is not a file"),
    "no answer": (["--answer", "dance"], "--answer 'dance' is not part of --needle"),
    "already there": (
        ["--needle", "Sentence 1", "--answer", "Sentence"],
        "already contains --needle 'Sentence 1'",
    ),
}


@pytest.mark.parametrize("name", NEEDLE_ERRORS)
def test_needle_errors(name, run, opened, checkpoint, haystack, tmp_path, capsys):
    flags, message = NEEDLE_ERRORS[name]
    standard = ["--checkpoint", checkpoint, "--haystack", haystack]
    more = ["--output-dir", tmp_path / "n", "--context-length", 600, "--min-length", 500]
    assert run("needle", *standard, *more, *flags) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert opened == []
    assert not (tmp_path / "n").exists()


def test_needle_needs_a_length(run, checkpoint, haystack, tmp_path, capsys):
    flags = ["--checkpoint", checkpoint, "--haystack", haystack, "--output-dir", tmp_path / "n"]
    assert run("needle", *flags) == 2
    assert "--context-length" in capsys.readouterr().err


def test_needle_without_a_tokenizer(run, opened, checkpoint, haystack, tmp_path, capsys):
    shutil.rmtree(checkpoint / "tokenizer")
    flags = ["--checkpoint", checkpoint, "--haystack", haystack, "--output-dir", tmp_path / "n"]
    assert run("needle", *flags, "--context-length", 600) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "has no tokenizer in it (folder tokenizer/)" in message
    assert "--tokenizer FILE_OR_FOLDER" in message


@pytest.mark.parametrize("tool", ["loss", "needle"])
def test_another_vocabulary_is_refused(
    tool, run, opened, checkpoint, tiny_dataset, haystack, tmp_path, capsys
):
    """Of the same size: only the hash tells them apart."""
    import sentencepiece

    size = load_tokenizer(checkpoint / "tokenizer").vocab_size
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_story(400).split(". ")),
        model_prefix=str(tmp_path / "other"),
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    flags = [*loss_flags(checkpoint, tiny_dataset, tmp_path / "o"), "--context-length", 64]
    if tool == "needle":
        flags = ["--checkpoint", checkpoint, "--haystack", haystack, "--context-length", 600]
        flags += ["--output-dir", tmp_path / "n"]
    assert run(tool, *flags, "--tokenizer", tmp_path / "other.model") == 2
    assert "another vocabulary" in " ".join(capsys.readouterr().err.split())
    assert opened == []


def test_a_dataset_of_a_larger_vocabulary_is_refused(
    run, opened, checkpoint, tiny_dataset, tmp_path, capsys
):
    shutil.rmtree(checkpoint / "tokenizer")
    (checkpoint / "hf_config.json").write_text('{"vocab_size": 100}')
    flags = loss_flags(checkpoint, tiny_dataset, tmp_path / "loss.json")
    assert run("loss", *flags, "--context-length", 64) == 2
    assert "one of 100" in " ".join(capsys.readouterr().err.split())


def test_another_dataset_than_the_model_s_is_refused(
    run, opened, checkpoint, tiny_dataset, tmp_path, capsys
):
    import sentencepiece

    (checkpoint / "tokenizer" / "tokenizer.model").unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_story(400).split(". ")),
        model_prefix=str(checkpoint / "tokenizer" / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    flags = loss_flags(checkpoint, tiny_dataset, tmp_path / "loss.json")
    assert run("loss", *flags, "--context-length", 64) == 2
    assert "--dataset" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["loss", "needle"])
def test_help_and_missing_flags_without_importing_torch(tool):
    command = [sys.executable, "-X", "importtime", f"tools/evaluate_{tool}.py"]
    shown = subprocess.run([*command, "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert shown.returncode == 0
    assert "--context-length" in shown.stdout
    imported = {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}
    assert "numpy" in imported
    assert not imported & {"torch", "megatron", "matplotlib"}
    missing = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert missing.returncode == 2
    assert "--checkpoint" in missing.stderr
