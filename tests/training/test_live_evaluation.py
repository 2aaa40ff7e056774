"""Evaluation between training steps: the run stays as it was, the results are those of the tools."""

import json
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_long.errors import ConfigError
from megatron_long.evaluation.live_evaluation import EvaluationArguments, Logs, plan_live_evaluation
from megatron_long.evaluation.loss.loss_report import read_loss_report
from megatron_long.evaluation.needle.needle_report import read_needle_report

LENGTH = 1024


def make_story(path: Path) -> Path:
    sentences = [
        f"The {number}th page tells of model {number * 7} and token {number % 13}"
        for number in range(400)
    ]
    path.write_text(". ".join(sentences) + ".")
    return path


@pytest.fixture
def story(tmp_path: Path) -> Path:
    return make_story(tmp_path / "story.txt")


def make_args(tmp_path: Path, **flags) -> Namespace:
    own = {field.name: field.default for field in fields(EvaluationArguments)}
    run = {
        "save": str(tmp_path / "ckpt"),
        "seq_length": LENGTH,
        "global_batch_size": 2,
        "train_iters": 5,
        "num_layers_per_virtual_pipeline_stage": None,
    }
    return Namespace(**(own | run | flags))


def test_nothing_is_planned_unless_asked(tmp_path, tiny_dataset):
    assert plan_live_evaluation(make_args(tmp_path), str(tiny_dataset), None) is None


def test_when_it_is_due(tmp_path, tiny_dataset):
    args = make_args(tmp_path, position_loss_interval=2)
    plan = plan_live_evaluation(args, str(tiny_dataset), None)
    assert [step for step in range(1, 6) if plan.is_due(step)] == [2, 4, 5]
    assert plan.folder == tmp_path / "ckpt" / "evaluation"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"needle_interval": 5}, "give --needle-haystack FILE"),
        ({"needle_interval": 0, "needle_haystack": "story.txt"}, "--needle-interval 0"),
        ({"needle_interval": 5, "needle_haystack": "nowhere.txt"}, "nowhere.txt is not a file"),
        ({"position_loss_interval": 5, "save": None}, "neither --save nor --evaluation-dir"),
        (
            {"position_loss_interval": 5, "num_layers_per_virtual_pipeline_stage": 2},
            "virtual pipeline stages",
        ),
        (
            {"needle_interval": 5, "needle_num_lengths": 0},
            "--needle-num-lengths 0 measures nothing",
        ),
        (
            {"position_loss_interval": 5, "position_loss_documents": -5},
            "--position-loss-documents -5 measures nothing",
        ),
        (
            {"position_loss_interval": 5, "evaluation_dir": "/dev/null/results"},
            "--evaluation-dir /dev/null/results",
        ),
    ],
)
def test_bad_flags_are_refused(flags, words, tmp_path, tiny_dataset):
    with pytest.raises(ConfigError) as refused:
        plan_live_evaluation(
            make_args(tmp_path, **flags), str(tiny_dataset), tiny_dataset / "tokenizer"
        )
    assert words in str(refused.value)


def test_needs_a_dataset_and_a_tokenizer(tmp_path, tiny_dataset, story):
    with pytest.raises(ConfigError, match="held-out documents of --dataset"):
        plan_live_evaluation(make_args(tmp_path, position_loss_interval=2), None, None)
    args = make_args(tmp_path, needle_interval=2, needle_haystack=str(story))
    with pytest.raises(ConfigError, match="needs the model's tokenizer"):
        plan_live_evaluation(args, str(tiny_dataset), None)


def test_figures_go_to_tensorboard_and_wandb():
    """Stand-ins note what they are given; the real ones are in `test_wandb.py`."""
    from types import SimpleNamespace

    calls = []
    board = SimpleNamespace(
        add_scalar=lambda *call: calls.append(("scalar", *call)),
        add_figure=lambda *call, **_: calls.append(("figure", *call)),
    )
    wandb = SimpleNamespace(
        Image=lambda figure: f"image of {figure}",
        log=lambda *call: calls.append(("wandb", *call)),
    )
    logs = Logs(board, wandb)
    logs.scalar("needle/exact_match", 0.5, 7)
    logs.figure("needle/heatmap", "figure", 7)  # type: ignore[arg-type]
    assert calls == [
        ("scalar", "needle/exact_match", 0.5, 7),
        ("wandb", {"needle/exact_match": 0.5}, 7),
        ("figure", "needle/heatmap", "figure", 7),
        ("wandb", {"needle/heatmap": "image of figure"}, 7),
    ]


@pytest.mark.slow
def test_training_is_the_same_bit_by_bit(tiny_dataset, run_job, tmp_path, story):
    """With dropout, so that a random number drawn by the evaluation would change every later loss."""
    command = ["-m", "megatron_long.pretrain", "--recipe", "tiny_debug", "--dataset", tiny_dataset]
    command += ["--seq-length", LENGTH, "--global-batch-size", 4, "--train-iters", 5]
    command += ["--hidden-dropout", 0.1, "--use-distributed-optimizer", "--allow-repeat"]
    command += ["--overlap-grad-reduce", "--overlap-param-gather"]
    runs = {"plain": [], "evaluated": ["--needle-interval", 2, "--position-loss-interval", 3]}
    grid = ["--needle-haystack", story, "--needle-min-length", 700, "--needle-num-lengths", 2]
    runs["evaluated"] += [*grid, "--needle-num-depths", 3, "--tensorboard-dir", tmp_path / "board"]
    for name, flags in runs.items():
        where = ["--save", tmp_path / name, "--loss-log", tmp_path / f"{name}.jsonl"]
        run_job(2, [*command, *where, *flags])
    keys = ("iteration", "lm loss", "grad_norm")
    plain, evaluated = (
        [tuple(json.loads(line)[key] for key in keys) for line in path.read_text().splitlines()]
        for path in (tmp_path / "plain.jsonl", tmp_path / "evaluated.jsonl")
    )
    assert len(plain) == 5
    assert plain == evaluated
    folder = tmp_path / "evaluated" / "evaluation"
    written = {path.name: sorted(p.name for p in path.iterdir()) for path in folder.iterdir()}
    needle, loss = ["needle.json", "needle.png"], ["loss.json", "loss.png"]
    assert written == {
        "iter_0000002": [*needle, "progress.json"],
        "iter_0000003": [*loss, "progress.json"],
        "iter_0000004": [*needle, "progress.json"],
        "iter_0000005": [*loss, *needle, "progress.json"],
    }
    progress = json.loads((folder / "iter_0000004" / "progress.json").read_text())
    assert progress == {"iteration": 4, "tokens": 4 * 4 * LENGTH}
    check_tensorboard(tmp_path / "board")
    check_against_tools(tmp_path / "evaluated", tiny_dataset, story, run_job, tmp_path)


def check_tensorboard(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert [event.step for event in board.Images("needle/heatmap")] == [2, 4, 5]
    assert [event.step for event in board.Images("position-loss/curves")] == [3, 5]
    assert "needle/exact_match" in board.Tags()["scalars"]
    assert any(tag.startswith("position-loss/Book ") for tag in board.Tags()["scalars"])


def check_against_tools(checkpoint, dataset, story, run_job, tmp_path) -> None:
    """The tools on the last checkpoint see what the evaluation after the last step saw."""
    last = checkpoint / "evaluation" / "iter_0000005"
    command = ["tools/evaluate_needle.py", "--checkpoint", checkpoint, "--haystack", story]
    command += ["--context-length", LENGTH, "--min-length", 700, "--num-lengths", 2]
    run_job(1, [*command, "--num-depths", 3, "--output-dir", tmp_path / "needle"])
    live = read_needle_report(last / "needle.json").results
    again = read_needle_report(tmp_path / "needle" / "needle.json").results
    assert len(live) == 6
    for cell, other in zip(live, again, strict=True):
        assert cell.key == other.key
        assert cell.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-5)
    command = ["tools/evaluate_loss.py", "--checkpoint", checkpoint, "--dataset", dataset]
    command += ["--context-length", LENGTH, "--max-documents-per-source", 16]
    run_job(1, [*command, "--output", tmp_path / "loss.json"])
    live, again = (
        read_loss_report(path).loss for path in (last / "loss.json", tmp_path / "loss.json")
    )
    for source in live.loss_sums:
        assert live.mean(0, LENGTH, source) == pytest.approx(
            again.mean(0, LENGTH, source), abs=1e-5
        )
