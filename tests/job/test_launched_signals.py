"""Signals to a launched run: from SLURM, from a terminal, and by hand; what it leaves behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from megatron_long.checkpoint.choosing import check_whole
from tests.launched import (
    GRACE_S,
    REPOSITORY,
    TRACKER,
    Launched,
    Terminal,
    all_processes,
    count_lines,
    end_all,
    tracked,
    wait_for_helpers,
    wait_until,
)


@pytest.mark.slow
def test_launcher_lets_training_save_and_leave(flags, jobs, tmp_path):
    """SIGTERM to the launcher alone, as from `scancel`; before it, another job is kept from the folder."""
    log = tmp_path / "log.jsonl"
    more = (*flags, "--train-iters", 100_000)
    with Launched(jobs.dataset, *more) as launched:
        wait_until(lambda: count_lines(log) >= 3)
        rank = all_processes(launched.launcher)[1]
        told = " ".join(jobs.run(2, *flags, status=2).text.split())
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(rank.create_time()))
        holder = f"(process {rank.pid} on {socket.gethostname()}, started {began}"
        assert f"--save {tmp_path / 'out'} is in use by another job {holder}" in told
        launched.launcher.send_signal(signal.SIGTERM)
        launched.check_left(0, [])
    assert tracked(tmp_path / "out") == count_lines(log)


@pytest.mark.slow
@pytest.mark.parametrize("happens", ["Ctrl-C", "closed"])
def test_a_terminal_lets_training_save_and_leave(happens, flags, jobs, tmp_path):
    """Ctrl-C reaches every process, the helpers of a save too; a closed terminal takes no more text."""
    out, log, terminal = tmp_path / "out", tmp_path / "log.jsonl", Terminal()
    more = (*flags, "--save-interval", 10, "--num-workers", 1, "--train-iters", 100_000)
    with Launched(jobs.dataset, *more, terminal=terminal.program) as launched:
        wait_until(lambda: terminal.reads() and (out / TRACKER).exists())
        processes = wait_for_helpers(launched.launcher, out)
        if happens == "Ctrl-C":
            terminal.press_ctrl_c()
            wait_until(lambda: terminal.reads() and launched.launcher.poll() is not None)
            assert "interrupted: " in terminal.text
            assert "Traceback" not in terminal.text
        else:
            terminal.close()
        launched.check_left(0, processes)
    assert tracked(out) == count_lines(log)
    assert check_whole(out / f"iter_{tracked(out):07d}")


@pytest.mark.slow
def test_ctrl_c_again_ends_a_run_that_cannot_leave(flags, jobs, tmp_path):
    """One rank has been stopped by the kernel: the step never ends."""
    log, terminal = tmp_path / "log.jsonl", Terminal()
    more = (*flags, "--train-iters", 100_000)
    with Launched(jobs.dataset, *more, terminal=terminal.program) as launched:
        wait_until(lambda: terminal.reads() and count_lines(log) >= 3)
        processes = all_processes(launched.launcher)
        processes[2].suspend()
        terminal.press_ctrl_c()
        wait_until(lambda: terminal.reads("Ctrl-C again ends it at once"))
        assert launched.launcher.poll() is None

        def presses_until_it_ends() -> bool:
            terminal.press_ctrl_c()
            return terminal.reads() and launched.launcher.poll() is not None

        wait_until(presses_until_it_ends)
        terminal.reads()
        assert "interrupted twice" in terminal.text
        assert "Traceback" not in terminal.text
        launched.check_left(130, processes)


@pytest.mark.slow
def test_a_signal_to_every_process_of_the_run(flags, jobs, tmp_path):
    """As SLURM sends it, also to the helpers that an earlier save has started and to the writer."""
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    more = (*flags, "--save-interval", 10, "--async-save")
    with Launched(jobs.dataset, *more, "--train-iters", 100_000) as launched:
        processes = wait_for_helpers(launched.launcher, out)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # a writer that is done
                process.send_signal(signal.SIGUSR1)
        launched.check_left(0, processes)
    assert tracked(out) == count_lines(log)
    assert check_whole(out / f"iter_{tracked(out):07d}")


@pytest.mark.slow
def test_nothing_of_a_killed_rank_is_left(flags, jobs, tmp_path):
    more = (*flags, "--save-interval", 10, "--train-iters", 100_000)
    with Launched(jobs.dataset, *more) as launched:
        processes = wait_for_helpers(launched.launcher, tmp_path / "out")
        processes[1].kill()
        launched.check_left(1, processes)


WAITING_RANK = """
import os, pathlib, sys, time
from megatron_long.job import signals
signals.leave_before_training()
path = pathlib.Path(sys.argv[1], os.environ["RANK"])
path.with_suffix(".new").write_text(str(os.getpid()))
path.with_suffix(".new").rename(path)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_one_rank_before_the_first_step_ends_all(number, tmp_path):
    """The others would wait for it until a timeout of half an hour."""
    script, ranks = tmp_path / "rank.py", [tmp_path / "0", tmp_path / "1"]
    script.write_text(WAITING_RANK)
    command = [sys.executable, "-m", "megatron_long.launch", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    launcher = subprocess.Popen(
        [*command, script, tmp_path],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait_until(lambda: all(path.exists() for path in ranks))
        os.kill(int(ranks[1].read_text()), number)
        _, told = launcher.communicate(timeout=60)
    finally:
        end_all(launcher)
    assert launcher.returncode == 0, told
    assert "Traceback" not in told
    assert f"{number.name} came before the first step" in told


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_before_the_first_step_leaves_at_once(number):
    """SIGHUP as it comes where nobody reads any more: what cannot be printed changes nothing."""
    script = "from megatron_long.job import signals; signals.leave_before_training(); "
    script += "import time; print('on', flush=True); time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "on\n"
    if number == signal.SIGHUP:
        process.stderr.close()
    process.send_signal(number)
    assert process.wait(GRACE_S) == 0
    if number == signal.SIGUSR1:
        assert "SIGUSR1 came before the first step" in process.stderr.read()
