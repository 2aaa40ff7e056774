"""A rank that stops answering ends the job, and every rank leaves its stacks."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

TIMEOUT_S = 4
JOB = Path(__file__).with_name("watchdog_job.py")


@pytest.mark.slow
@pytest.mark.parametrize("native", [False, True], ids=["python", "native code holding the lock"])
def test_a_rank_that_hangs_ends_the_job(native, jobs, tmp_path):
    fault = {"kind": "hang", "ranks": [1], "steps": [3], "native": native}
    began = time.monotonic()
    flags = ("--train-iters", 6, "--save", tmp_path / "ckpt", "--hang-timeout", TIMEOUT_S)
    job = jobs.run(2, *flags, faults=[fault], status=1)
    took = time.monotonic() - began
    print(f"ended after {took:.0f} s")
    stacks = [(tmp_path / "ckpt" / "stacks" / f"rank_0000{n}.txt").read_text() for n in (0, 1)]
    assert "in loss_function" in stacks[1]
    assert "job_server.py" in stacks[1]
    assert "train_step" in stacks[0]  # waits in a collective
    assert "in loss_function" not in stacks[0]
    assert re.search(
        r"rank \d has (sent no heartbeat|received no heartbeat).*--hang-timeout 4 s", job.text
    )
    assert "iteration        2/       6" in job.text
    assert took < 90


@pytest.mark.slow
def test_a_run_that_answers_leaves_no_stacks(jobs, tmp_path):
    flags = ("--train-iters", 3, "--save", tmp_path / "ckpt", "--hang-timeout", 60)
    jobs.run(2, *flags)
    assert not (tmp_path / "ckpt" / "stacks").exists()


def play(folder: Path, *parts: str) -> tuple[list[int], list[str], float]:
    """Give how the processes of `watchdog_job.py` ended, their stacks, and the seconds it took."""
    began = time.monotonic()
    command = [sys.executable, JOB, folder, *parts]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    print(result.stderr)
    paths = [folder / "stacks" / f"rank_0000{rank}.txt" for rank in range(len(parts))]
    stacks = [path.read_text() if path.exists() else "" for path in paths]
    return json.loads(result.stdout.splitlines()[-1]), stacks, time.monotonic() - began


@pytest.mark.parametrize("host", ["", "host:"], ids=["launcher's store", "rank 0's store"])
@pytest.mark.parametrize("part", ["hang", "native"])
def test_processes_with_time_left_write_before_the_late_one_ends(host, part, tmp_path):
    statuses, stacks, _ = play(tmp_path, f"{host}train", part, "train")
    assert statuses == [1, 1, 1]
    for text in (stacks[0], stacks[2]):
        assert "beat_until_end" in text
    assert "run_rank" in stacks[1]
    assert ("Timeout (" in stacks[1]) is (part == "native")


def test_rank_0_hangs_and_hosts_the_store(tmp_path):
    statuses, stacks, _ = play(tmp_path, "host:native", "train")
    assert statuses == [1, 1]
    assert "run_rank" in stacks[0]
    assert "beat_until_end" in stacks[1]


@pytest.mark.parametrize(("part", "status"), [("stand still", None), ("die", -9)])
def test_the_wait_for_a_process_that_cannot_answer_is_bounded(part, status, tmp_path):
    statuses, stacks, _ = play(tmp_path, "train alone", part, "hang")
    assert statuses == [1, status, 1]
    assert "in beat_on" in stacks[0]
    assert "run_rank" in stacks[2]


def test_the_end_comes_without_a_store(tmp_path):
    statuses, stacks, _ = play(tmp_path, "host:die", "hang")
    assert statuses == [-9, 1]
    assert "run_rank" in stacks[1]


def test_a_process_that_has_left_is_not_missed(tmp_path):
    statuses, stacks, _ = play(tmp_path, "train alone", "leave", "leave")
    assert statuses == [0, 0, 0]
    assert stacks == ["", "", ""]
    assert not (tmp_path / "stacks").exists()


def test_the_kernel_ends_what_cannot_even_write(tmp_path):
    """As on a file system that no longer answers: here a pipe that nobody empties."""
    (tmp_path / "stacks").mkdir()
    path = tmp_path / "stacks" / "rank_00000.txt"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    command = [sys.executable, JOB, tmp_path, "hang"]
    result = subprocess.run(command, capture_output=True, timeout=600, check=True)
    os.close(reader)
    os.close(writer)
    statuses = json.loads(result.stdout)
    assert statuses == [-14]  # SIGALRM


def test_stacks_of_before_a_restart_stay(tmp_path):
    (tmp_path / "stacks").mkdir()
    kept = tmp_path / "stacks" / "rank_00000.txt"
    kept.write_text("of before\n")
    statuses, stacks, _ = play(tmp_path, "leave", "leave")
    assert (statuses, stacks) == ([0, 0], ["of before\n", ""])


CHILD = """
import sys, time
from megatron_long.job.watchdog import Watchdog
dog = Watchdog(float(sys.argv[1]), None, 3)
dog.end_step()
for _ in range(int(sys.argv[2])):
    time.sleep(0.2)
    dog.beat()
if sys.argv[3] == "hang":
    time.sleep(60)
dog.stop()
"""


@pytest.mark.parametrize(
    ("timeout_s", "beats", "then", "status"),
    [(0.5, 5, "leave", 0), (0.5, 2, "hang", 1), (0, 1, "leave", 0)],
)
def test_signs_of_life(timeout_s, beats, then, status):
    command = [sys.executable, "-c", CHILD, str(timeout_s), str(beats), then]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == status
    assert ("most recent call first" in result.stderr) is (then == "hang")
    assert ("rank 3 has sent no heartbeat" in result.stderr) is (then == "hang")


FIRST_STEP = """
import time
from megatron_long.job.watchdog import Watchdog
dog = Watchdog(0.5, None, 3)
dog.beat()
time.sleep(1.2)
dog.beat()
time.sleep(1.2)
dog.end_step()
print("first step done", flush=True)
dog.beat()
time.sleep(1.2)
print("never")
"""


def test_every_micro_batch_of_the_first_step_may_take_longer():
    command = [sys.executable, "-c", FIRST_STEP]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stdout) == (1, "first step done\n")
    assert "rank 3 has sent no heartbeat" in result.stderr
