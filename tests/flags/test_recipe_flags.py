"""Flags of a recipe that follow those of the user."""

import pytest

from megatron_long.command_line import parse
from megatron_long.flags.backend import detect_backend

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
        ("--seq-length 4096", {"seq_length": 4096, "max_position_embeddings": 4096}),
        ("--seq-length 4K", {"seq_length": 4096, "max_position_embeddings": 4096}),
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


BUDGET, BATCH = 1024**2, 16 * 1024
"""Of `tiny_debug`, tokens: 64 steps of 8 windows of 2,048."""


@pytest.mark.parametrize(
    ("flags", "windows", "steps"),
    [
        ("", 8, 64),
        ("--seq-length 2048 --global-batch-size 8", 8, 64),
        ("--seq-length 4096", 4, 64),
        ("--seq-length 1024", 16, 64),
        ("--seq-length 3072", 5, 68),
        ("--seq-length 32K", 1, 32),
        ("--global-batch-size 32", 32, 16),
        ("--global-batch-size=32", 32, 16),
        ("--seq-length 4096 --global-batch-size 32", 32, 8),
        ("--seq-length 4096 --train-iters 9", 4, 9),
        ("--global-batch-size 32 --train-iters 9", 32, 9),
    ],
)
def test_the_budget_stays(flags, windows, steps, capsys):
    _, args = parse([*USER.split(), *flags.split()], detect_backend(), 1)
    assert (args.global_batch_size, args.train_iters) == (windows, steps)
    if "--train-iters" not in flags:
        assert 0.97 * BUDGET < windows * steps * args.seq_length <= BUDGET
    told = " ".join(capsys.readouterr().err.split())
    for flag, now, before in (("--global-batch-size", windows, 8), ("--train-iters", steps, 64)):
        changed = now != before and flag not in flags
        assert (f"{flag} {now} (was {before})" in told) is changed


@pytest.mark.parametrize(
    ("flags", "samples"),
    [
        ("--train-samples 80 --seq-length 4096", 80),
        ("--step-batch-size-schedule 0:2", BUDGET // 2048),
        ("--step-batch-size-schedule 0:2 --seq-length 4096", BUDGET // 4096),
    ],
)
def test_the_budget_stays_in_windows(flags, samples):
    _, args = parse([*USER.split(), *flags.split()], detect_backend(), 1)
    assert (args.train_samples, args.train_iters) == (samples, None)
    assert (args.global_batch_size is None) == ("schedule" in flags)


@pytest.mark.parametrize("recipe", ["llama2_7b_80k", "llama2_7b_128k", "llama3_8b_128k"])
def test_a_paper_run_at_another_length_reads_as_much(recipe):
    """131,072 to 65,536 tokens once halved the run to 2.5B, and a doubled batch made it 10B."""
    flags = ["--recipe", recipe, *USER.split()[2:-1], "32000", "--context-parallel-size", "1"]
    for more in (
        "--seq-length 64K",
        "--global-batch-size 64",
        "--seq-length 64K --global-batch-size 16",
    ):
        _, args = parse([*flags, *more.split()], detect_backend(), 8)
        tokens = args.train_iters * args.global_batch_size * args.seq_length
        assert tokens == pytest.approx(5e9, rel=2e-3)


@pytest.mark.slow
def test_training_takes_them(jobs, read_log, tmp_path):
    """A lower rate, and samples instead of steps."""
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
    assert "is skipped" not in job.text
