"""Forked programs end as interpreters of their own do."""

import subprocess

import pytest

RANK = "import os, sys, time; rank = os.environ.get('RANK')\n"


@pytest.mark.parametrize("fresh", [False, True], ids=["forked", "fresh"])
@pytest.mark.parametrize(
    ("code", "status", "stdout", "stderr"),
    [
        ("import sys; print(sys.argv, __name__)", 0, "['-c', 'a b'] __main__\n", ""),
        ("import sys; sys.exit('too bad')", 1, "", "too bad\n"),
        ("import sys; sys.exit(7)", 7, "", ""),
        ("import atexit; atexit.register(print, 'end')", 0, "end\n", ""),
        ("import os; print('lost', end='', flush=True); os.kill(os.getpid(), 9)", -9, "lost", ""),
        ("import sys; print(repr(sys.stdin.read()), os)", 1, "", "NameError"),
    ],
)
def test_status_and_output(run_job, code, status, stdout, stderr, fresh):
    done = run_job(1, ["-c", code, "a b"], check=False, fresh=fresh)
    assert (done.returncode, done.stdout) == (status, stdout)
    assert stderr in done.stderr


def test_the_ranks_of_a_failed_job_end(run_job, tmp_path):
    """Its status is 1, as torchrun's, whatever the rank's was."""
    (tmp_path / "job.py").write_text(RANK + "sys.exit(7) if rank == '1' else time.sleep(600)")
    assert run_job(2, [tmp_path / "job.py"], check=False).returncode == 1


def test_a_job_without_end_is_killed_and_the_next_one_runs(run_job):
    with pytest.raises(subprocess.TimeoutExpired):
        run_job(1, ["-c", "import time; time.sleep(600)"], timeout=1)
    assert run_job(1, ["-c", "print(1)"]).stdout == "1\n"
    with pytest.raises(AssertionError, match="exit status 3"):
        run_job(1, ["-c", "raise SystemExit(3)"])
