"""Forked programs end as interpreters of their own do."""

import platform
import subprocess

import psutil
import pytest

from tests.launched import wait_until

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


@pytest.fixture
def python(warm_python):
    """Start the quick `python`."""

    def start(*words: str, **options) -> subprocess.Popen[str]:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen([warm_python, *words], text=True, **pipes, **options)

    return start


@pytest.mark.parametrize(
    ("words", "status", "stdout"),
    [
        (("-c", "import sys; print(sys.argv, sys.stdin.read())", "a b"), 0, "['-c', 'a b'] in\n"),
        (("-u", "-m", "json.tool", "--no-such"), 2, ""),
        (("-c", "import os; print(os.environ['MINE'], os.getcwd())"), 0, "yes /\n"),
        (("-c", "import os; os.kill(os.getpid(), 9)"), -9, ""),
        (("-c", "import os; os.kill(os.getpid(), 15)"), -15, ""),
        (("-V",), 0, f"Python {platform.python_version()}\n"),
    ],
)
def test_a_quick_python_is_a_python(words, status, stdout, python):
    process = python(*words, cwd="/", env={"MINE": "yes"})
    assert (process.communicate("in")[0], process.returncode) == (stdout, status)


def test_what_a_quick_python_starts_is_quick(python, warm_python):
    code = "import subprocess, sys; print(sys.executable, flush=True); "
    code += "print('torch' in sys.modules, flush=True); "
    code += "subprocess.run([sys.executable, '-c', 'import sys; print(\"torch\" in sys.modules)'])"
    assert python("-c", code).communicate()[0] == f"{warm_python}\nTrue\nTrue\n"


def test_signals_reach_the_program(python):
    code = "import signal, time; signal.signal(15, lambda *_: exit(5)); print(1, flush=True); "
    process = python("-c", code + "time.sleep(600)")
    assert process.stdout.readline() == "1\n"
    process.terminate()
    assert process.wait() == 5


def test_a_killed_program_takes_along_what_it_has_started(python):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    process = python("-c", f"import os; print(os.getpid(), flush=True); {start}")
    started = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(psutil.pid_exists, started)))
