"""Saves that fail, signals that are really sent, processes that are really killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_long.checkpoint.choosing import check_whole, saved_iterations
from tests.job_fixtures import FLAGS
from tests.launched import REPOSITORY, count_lines, tracked, wait_until
from tests.training.test_exact_resume import differing, read_state

NAMESPACE = ("unshare", "--map-root-user", "--user", "--mount")


def can_mount() -> bool:
    if not shutil.which("unshare"):
        return False
    command = [*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


FULL_DISK = """
set -e
mount -t tmpfs -o size=16m none "$1"
(until [ -e "$1/ckpt/hashes.json" ]; do sleep 0.02; done  # the run has begun
 cat /dev/zero > "$1/ballast" || true
 for i in {1..3000}; do grep -q "could not be saved" "$1.log" && break; sleep 0.05; done
 rm "$1/ballast") > /dev/null 2>&1 &
shift 1
"$@" > "$DISK.log" 2>&1 || { cat "$DISK.log" >&2; exit 1; }
find "$DISK" -type f
cp "$DISK/ckpt/latest_checkpointed_iteration.txt" "$DISK.tracker"
cp "$DISK/log.jsonl" "$DISK.jsonl"
"""


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="no right to mount a small file system")
@pytest.mark.parametrize("more", [(), ("--async-save",)], ids=["at once", "in the background"])
def test_a_full_disk_does_not_end_training(more, tiny_dataset, read_log, tmp_path):
    """The first save fails; it is tried again soon, and all steps are trained.

    Losses, TensorBoard and evaluations are on that disk too, as the launch script has them.
    """
    disk, log = tmp_path / "disk", tmp_path / "disk.jsonl"
    disk.mkdir()
    command = [sys.executable, "-m", "megatron_long.pretrain", *FLAGS, "--dataset", tiny_dataset]
    command += ["--train-iters", 30, "--save-interval", 6]
    command += ["--save", disk / "ckpt", "--keep-last", 1]
    command += ["--loss-log", disk / "log.jsonl", "--tensorboard-dir", disk / "board"]
    command += ["--position-loss-interval", 3, "--position-loss-documents", 1]
    command += ["--log-interval", 1, "--use-distributed-optimizer", *more]
    environment = {**os.environ, "DISK": str(disk), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*NAMESPACE, "bash", "-c", FULL_DISK, "bash", *map(str, (disk, *command))],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert [step["iteration"] for step in read_log(log)] == list(range(1, 31))
    errors = (tmp_path / "disk.log").read_text()
    failed = [line for line in errors.splitlines() if "could not be saved" in line]
    assert "checkpoint of iteration 6 could not be saved" in failed[0]
    assert "No space left on device" in failed[0]
    if not more:
        assert "the next try is at iteration 7" in failed[0]
    assert len(failed) < 4
    assert (tmp_path / "disk.tracker").read_text() == "30"
    folders = {
        Path(line).parent.name for line in result.stdout.splitlines() if "/ckpt/iter_" in line
    }
    assert folders == {"iter_0000030"}


@pytest.mark.slow
def test_saving_in_the_background_gives_the_same_checkpoints(jobs, tmp_path):
    """Weights and optimizer as they were at their step, not as they are when the writer is done."""
    common = ("--train-iters", 14, "--save-interval", 4, "--use-distributed-optimizer")
    jobs.run(2, *common, "--save", tmp_path / "sync")
    job = jobs.run(2, *common, "--save", tmp_path / "async", "--async-save", "--keep-last", 3)
    assert "scheduled an async checkpoint save at iteration       4" in job.text
    folder = tmp_path / "async"
    assert saved_iterations(folder) == [14, 12, 8]
    assert not list(folder.glob(".iter_*"))
    assert tracked(folder) == 14
    for iteration in (8, 12, 14):
        path = folder / f"iter_{iteration:07d}"
        assert check_whole(path)
        expected = tmp_path / "sync" / path.name
        assert differing(read_state(path), read_state(expected)) == []
        facts = [json.loads((place / "training.json").read_text()) for place in (path, expected)]
        assert facts[0]["guard"] == facts[1]["guard"]
        assert len(facts[0]["guard"]["losses"]) == iteration


@pytest.mark.slow
def test_signals_wait_for_what_is_written_in_the_background(jobs, flags, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    jobs.start(2, *flags, "--async-save", "--save-interval", 2)
    wait_until(lambda: count_lines(log) >= 5)
    os.kill(jobs.pids[0], signal.SIGTERM)
    assert jobs.wait().statuses == [0, 0]
    assert tracked(out) == count_lines(log)
    assert check_whole(out / f"iter_{tracked(out):07d}")
    assert not list(out.glob(".iter_*"))


PLAIN_FLAGS = """
--seq-length 128 --micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --min-lr 1e-3 --log-interval 1
--calculate-per-token-loss
""".split()


@pytest.mark.slow
def test_a_signal_is_heard_without_a_recipe(jobs, flags, tmp_path):
    """Recipes give --exit-signal-handler; without it Megatron's loop would not look for signals."""
    jobs.start(1, *flags, "--save-interval", 1000, base=PLAIN_FLAGS)
    wait_until(lambda: count_lines(tmp_path / "log.jsonl") >= 3)
    os.kill(jobs.pids[0], signal.SIGTERM)
    job = jobs.wait()
    assert job.statuses == [0]
    assert "nothing to save" not in job.text
    assert tracked(tmp_path / "out") == count_lines(tmp_path / "log.jsonl")


@pytest.mark.slow
def test_signals_and_kills_in_a_row(jobs, flags, read_log, tmp_path):
    """Each start is the same command. USR1 to all ranks, TERM to one; then SIGKILL at bad moments."""
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    saved = 0
    for number, ranks in ((signal.SIGUSR1, (0, 1)), (signal.SIGTERM, (1,))):
        jobs.start(2, *flags)
        wait_until(lambda: count_lines(log) >= saved + 3)  # noqa: B023
        for rank in ranks:
            os.kill(jobs.pids[rank], number)
        began = time.monotonic()
        assert jobs.wait().statuses == [0, 0]
        print(f"left {time.monotonic() - began:.1f} s after {number.name}")
        saved = tracked(out)
        assert saved == read_log(log)[-1]["iteration"]
    while_saving = lambda: bool(list(out.glob(".iter_*.partial")))  # noqa: E731
    in_a_step = lambda: count_lines(log) >= lines + 8  # noqa: E731
    for moment in (in_a_step, while_saving):
        lines = count_lines(log)
        jobs.start(2, *flags, "--save-interval", 5)
        wait_until(moment)
        for pid in jobs.pids:
            os.kill(pid, signal.SIGKILL)
        assert set(jobs.wait().statuses) == {-signal.SIGKILL}
        last = read_log(log)[-1]["iteration"]
        assert last - 5 <= tracked(out) <= last
    jobs.run(2, *flags, "--exit-interval", 5)
    seen = read_log(log)
    again = seen[-1]["iteration"]
    first = next(step for step in seen[::-1] if step["iteration"] == tracked(out) - 4)
    assert first["iteration"] == again - 4
    assert not list(out.glob(".iter_*"))
    by_step: dict[int, set[float]] = {}
    for step in seen:
        by_step.setdefault(step["iteration"], set()).add(step["lm loss"])
    assert sorted(by_step) == list(range(1, again + 1))
    assert all(len(losses) == 1 for losses in by_step.values())  # what was repeated was the same
