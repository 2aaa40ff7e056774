"""Helper processes: no signal that asks a run to leave ends them, and the end of the run does."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_long.job.signals import LEAVE_SIGNALS
from tests.launched import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
START_HELPERS = """
import atexit, multiprocessing, os, signal, time
from megatron_long.job import signals
heard = []
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
spawn = multiprocessing.get_context("spawn")
with signals.withheld():
    atexit.register(signals.kill_helpers)
    queue = spawn.Manager().Queue()
    writer = spawn.Process(target=time.sleep, args=(600,), daemon=True)
    writer.start()
    os.kill(os.getpid(), signal.SIGTERM)
assert heard == [signal.SIGTERM]
print("started", flush=True)
input()
queue.put("still here")
print(queue.get(), flush=True)
raise OSError
"""
MAIN_FILE = """
import multiprocessing, time
from megatron_long.job import signals
if __name__ == "__mp_main__":
    signals.end_with_parent()
elif __name__ == "__main__":
    results = multiprocessing.get_context("spawn").Manager()
    server = multiprocessing.get_context("forkserver")
    writer = server.Process(target=time.sleep, args=(600,), daemon=True)
    writer.start()
    print("started", flush=True)
    input()
"""


def start(*command: object) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """Start a script; give it and its helpers."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n", process.communicate()
    return process, psutil.Process(process.pid).children(recursive=True)


def test_helpers_outlive_every_signal_but_not_the_run():
    process, helpers = start("-c", START_HELPERS)
    assert len(helpers) == 3  # with the resource tracker
    for helper in helpers:
        for number in LEAVE_SIGNALS:
            helper.send_signal(number)
    said, errors = process.communicate("go on\n", timeout=600)
    assert said == "still here\n", errors
    assert process.returncode == 1
    assert psutil.wait_procs(helpers, 10)[1] == []


def test_helpers_end_when_the_parent_is_killed(tmp_path):
    """They import the main file again, as those of `megatron_long.pretrain` do."""
    script = tmp_path / "main.py"
    script.write_text(MAIN_FILE)
    process, helpers = start(script)
    assert len(helpers) == 4  # a resource tracker, the results, a fork server and its child
    process.kill()
    assert psutil.wait_procs(helpers, 10)[1] == []


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_rank_in_a_step_that_never_ends(jobs, tmp_path):
    """The first waits for the step; whoever presses on is heard by a thread."""
    hangs = tmp_path / "hangs"
    hang = {"kind": "hang", "ranks": [0], "steps": [1], "native": False, "path": str(hangs)}
    jobs.start(1, "--train-iters", 2, faults=[hang])
    (rank,) = jobs.pids
    wait_until(hangs.exists)

    def presses_until_it_ends() -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGINT)
        return not psutil.pid_exists(rank)

    wait_until(presses_until_it_ends)
    job = jobs.wait()
    assert job.statuses == [130], job.text[-2000:]
    assert job.text.count("interrupted: saving after this step, then exiting") == 1
    assert "interrupted twice: exiting at once" in job.text
    assert "Traceback" not in job.text
