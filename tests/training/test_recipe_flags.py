"""Flags of a recipe that follow those of the user."""

import pytest

from megatron_long.training.backend import detect_backend
from megatron_long.training.command_line import parse

USER = "--recipe tiny_debug --mock-data --tokenizer-type NullTokenizer --vocab-size 4096"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {"lr": 1e-3, "min_lr": 1e-3, "train_iters": 64, "train_samples": None}),
        ("--lr 1e-4", {"lr": 1e-4, "min_lr": 1e-4}),
        ("--lr=1e-4", {"lr": 1e-4, "min_lr": 1e-4}),
        ("--lr 1e-4 --min-lr 1e-5", {"min_lr": 1e-5}),
        ("--lr-decay-style cosine", {"lr": 1e-3, "min_lr": 0.0}),
        ("--lr-decay-style cosine --lr 2e-3", {"lr": 2e-3, "min_lr": 0.0}),
        ("--train-samples 80", {"train_iters": None, "train_samples": 80}),
        ("--step-batch-size-schedule 0:2", {"global_batch_size": None}),
        ("--seq-length 4096", {"seq_length": 4096, "max_position_embeddings": 4096}),
        ("--seq-length 1024", {"seq_length": 1024, "max_position_embeddings": 2048}),
        (
            "--seq-length 4096 --max-position-embeddings 8192",
            {"seq_length": 4096, "max_position_embeddings": 8192},
        ),
    ],
)
def test_the_rest_of_the_recipe_follows(flags, expected):
    _, args = parse([*USER.split(), *flags.split()], detect_backend(), 1)
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.slow
def test_training_takes_them(jobs, read_log, tmp_path):
    """A lower rate, and samples in the place of steps."""
    log = tmp_path / "log.jsonl"
    jobs.run(1, "--lr", 1e-4, "--min-lr", 1e-4, "--train-samples", 20, "--loss-log", log)
    assert [step["iteration"] for step in read_log(log)] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_overflows_of_fp16_are_no_faults(jobs, read_log, tmp_path):
    """Megatron's loss scale begins at 2**32 and halves at each overflow."""
    log = tmp_path / "log.jsonl"
    job = jobs.run(
        *(1, "--fp16", "--train-iters", 30, "--loss-log", log, "--max-faulty-steps", 0),
        *("--allow-repeat", "--hysteresis", 1),
    )
    assert len(read_log(log)) == 30
    assert "is left out" not in job.text
