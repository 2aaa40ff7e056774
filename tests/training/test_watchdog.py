"""A rank that stops answering ends the job, and every rank leaves its stacks."""

import subprocess
import sys
import time

import pytest

TIMEOUT_S = 4


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
    for text in stacks:
        assert "Timeout (0:00:04)!" in text
    assert "rank 0 has given no sign of life for too long (--hang-timeout 4 s)" in job.text
    assert "iteration        2/       6" in job.text
    assert took < 60


@pytest.mark.slow
def test_a_run_that_answers_leaves_no_stacks(jobs, tmp_path):
    flags = ("--train-iters", 3, "--save", tmp_path / "ckpt", "--hang-timeout", 60)
    jobs.run(2, *flags)
    assert not (tmp_path / "ckpt" / "stacks").exists()


CHILD = """
import sys, time
from megatron_long.training.watchdog import Watchdog
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
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert result.returncode == status
    assert ("Timeout" in result.stderr) is (then == "hang")
    assert ("rank 3 has given no sign of life" in result.stderr) is (then == "hang")


FIRST_STEP = """
import time
from megatron_long.training.watchdog import Watchdog
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
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout) == (1, "first step done\n")
    assert "Timeout (0:00:00.500000)!" in result.stderr
