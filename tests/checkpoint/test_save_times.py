"""Checkpoints by time: all ranks save when the time is over on one, and none is saved twice."""

import pytest

from megatron_long.checkpoint.choosing import saved_iterations

BY_TIME = (
    "--recipe tiny_debug --num-layers 2 --hidden-size 64 --kv-channels 16 --ffn-hidden-size 128"
)
BY_TIME += (
    " --padded-vocab-size 512 --seq-length 128 --max-position-embeddings 128 --global-batch-size 4"
)


def run(jobs, ranks, *flags, faults=()):
    jobs.start(ranks, *flags, faults=faults, base=BY_TIME.split())
    job = jobs.wait()
    assert job.statuses == [0] * ranks, job.text[-5000:]
    return job


@pytest.mark.slow
@pytest.mark.parametrize("background", [(), ("--async-save",)])
def test_all_ranks_save_when_one_says_so(background, jobs, tmp_path):
    """The clocks of two nodes never agree: one rank's alone is over, after steps 2, 3 and 6, the last."""
    clock = {"kind": "clock", "ranks": [1], "steps": [2, 3, 6]}
    never = {"kind": "clock", "ranks": [0], "steps": []}
    job = run(jobs, 2, "--train-iters", 6, "--save", tmp_path, *background, faults=[clock, never])
    assert "every 30 minutes and at the end in" in job.text
    saved = saved_iterations(tmp_path)
    assert saved[0] == 6
    assert 2 in saved
    assert set(saved) <= {2, 3, 6}  # in the background, 2 may still be being written after step 3
    if not background:
        assert saved == [6, 3, 2]
    assert job.text.count("saving checkpoint at iteration       6") <= 1


@pytest.mark.slow
def test_minutes_count_from_the_last_save(jobs, tmp_path):
    """No time at all passes for steps of --save-interval; every step is too long for a millisecond."""
    run(jobs, 1, "--train-iters", 4, "--save", tmp_path / "by-steps", "--save-interval", 3)
    assert saved_iterations(tmp_path / "by-steps") == [4, 3]
    flags = ("--train-iters", 4, "--save-minutes", 1e-6)
    run(jobs, 1, *flags, "--save", tmp_path / "each")
    assert saved_iterations(tmp_path / "each") == [4, 3, 2]  # the clock begins with the first step
    both = ("--save", tmp_path / "both", "--save-interval", 1, "--keep-last", 2)
    run(jobs, 1, *flags, *both)
    assert saved_iterations(tmp_path / "both") == [4, 3]
    run(
        jobs,
        1,
        "--train-iters",
        4,
        "--save-minutes",
        0,
        "--save",
        tmp_path / "end",
        "--keep-last",
        0,
    )
    assert saved_iterations(tmp_path / "end") == [4]


@pytest.mark.slow
def test_masked_training_without_a_recipe_does_not_depend_on_the_layout(
    jobs, read_log, make_dataset, tmp_path
):
    """Each token weighs the same, wherever the masked ones lie; once ranks weighed the same instead."""
    lengths = [7, 3, 200, 5, 2, 2, 2, 90, 130, 11] * 40
    flags = (
        "--num-layers 2 --hidden-size 64 --kv-channels 16 --ffn-hidden-size 128 --num-attention-heads 4 "
        "--group-query-attention --num-query-groups 2 --padded-vocab-size 512 --seq-length 128 --swiglu "
        "--max-position-embeddings 128 --micro-batch-size 1 --global-batch-size 4 --lr 2e-3 --train-iters 3 "
        "--normalization RMSNorm --position-embedding-type rope --disable-bias-linear --eod-mask-loss "
        "--document-masking --lr-decay-style constant --untie-embeddings-and-output-weights "
        "--attention-dropout 0 --hidden-dropout 0 --eval-interval 100 --eval-iters 0"
    ).split()
    data = ("--dataset", make_dataset(lengths))
    seen = []
    for ranks, layout in ((1, ()), (2, ("--context-parallel-size", 2)), (2, ())):
        log = tmp_path / f"{len(seen)}.jsonl"
        jobs.start(ranks, *data, *layout, "--loss-log", log, base=flags)
        job = jobs.wait()
        assert job.statuses == [0] * ranks, job.text[-5000:]
        seen.append([(step["lm loss"], step["grad_norm"]) for step in read_log(log)])
    for other in seen[1:]:
        for (loss, norm), (expected_loss, expected_norm) in zip(other, seen[0], strict=True):
            assert loss == pytest.approx(expected_loss, abs=2e-6)
            assert norm == pytest.approx(expected_norm, rel=1e-4)
