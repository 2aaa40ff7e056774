"""Who may take a folder, and that a lock ends with its process."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_long.errors import ConfigError
from megatron_long.job import save_lock
from megatron_long.job.save_lock import Holder, SaveLock, decide, this_process

REPOSITORY = Path(__file__).resolve().parents[2]
ME = this_process()
ELSEWHERE = Holder(host="far", boot_id="other", pid=7, started=1.0, beat=3)
HOLD = """
import sys, pathlib
from megatron_long.job.save_lock import hold
hold(pathlib.Path(sys.argv[1]))
print("held", flush=True)
input()
"""


@pytest.mark.parametrize(
    ("is_locked", "first", "now", "waited_s", "verdict"),
    [
        (True, None, None, 0, "take"),
        (True, ELSEWHERE, replace(ELSEWHERE, ended=True), 0, "take"),
        (False, ELSEWHERE, ELSEWHERE, 100, "wait"),  # a lost node's lease
        (False, ELSEWHERE, ELSEWHERE, 200, "refuse"),
        (False, ELSEWHERE, replace(ELSEWHERE, beat=4), 6, "refuse"),
        (None, ELSEWHERE, ELSEWHERE, 10, "wait"),
        (None, ELSEWHERE, ELSEWHERE, 60, "take"),  # no locks, no sign of life
        (None, ELSEWHERE, replace(ELSEWHERE, beat=4), 20, "refuse"),
        (True, ELSEWHERE, replace(ELSEWHERE, beat=4), 20, "refuse"),  # locks of one machine only
        (None, ME, ME, 0, "refuse"),
        (None, ME, replace(ME, started=1.0), 0, "take"),  # another process had that number
        (True, ME, ME, 0, "take"),
    ],
)
def test_who_may_take_a_folder(is_locked, first, now, waited_s, verdict):
    assert decide(ME, is_locked=is_locked, first=first, now=now, waited_s=waited_s) == verdict


def test_the_same_job_started_again_takes_its_folder():
    before = replace(ELSEWHERE, job="12", attempt=(0, 0))
    again = replace(ME, job="12", attempt=(1, 0))
    assert decide(again, is_locked=True, first=before, now=before, waited_s=0) == "take"


def test_another_job_is_named_and_a_killed_one_holds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(save_lock, "GRACE_S", 0.5)
    command = [sys.executable, "-c", HOLD, tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            words = rf"in use by another job \(process {holder.pid} on \S+, started \d{{4}}-"
            with pytest.raises(ConfigError, match=words):
                SaveLock(tmp_path).take()
        finally:
            holder.send_signal(signal.SIGKILL)
    lock = SaveLock(tmp_path)
    lock.take()
    lock.release()
