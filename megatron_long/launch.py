"""`torchrun` that lets training save and exit: `python -m megatron_long.launch [torchrun's arguments]`.

Torchrun answers SIGTERM, Ctrl-C and SIGHUP by ending its processes 30 s later and itself with status 1 and a
traceback, and SIGUSR1 by dying. Here they are forwarded to the processes, and torchrun waits until they have
saved; its status is then theirs. A second Ctrl-C kills them. While no process runs, as while it waits for
the other nodes, it exits at once with status 0.

With `--enable-ft-package` among the training flags, the launcher is `ft_launcher` of
nvidia-resiliency-ext, which also ends and restarts (`--max-restarts`) ranks that the kernel has stopped.
"""

import contextlib
import importlib
import os
import signal
import socket
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from types import FrameType

import psutil  # not in the handler: a second signal could interrupt the import

from megatron_long.cli import run_tool
from megatron_long.flags.argv import Argv
from megatron_long.flags.rules import check_rules
from megatron_long.job import hang_monitor
from megatron_long.job.side_output import keep_standard_streams
from megatron_long.job.signals import (
    INTERRUPTED_STATUS,
    LAUNCHER_VARIABLE,
    Interrupts,
    leave,
    set_handlers,
)

OTHER_SIGNALS = "SIGQUIT"
"""Signals that torchrun keeps handling itself."""
LOG_FLAGS = ("--log-dir", "--log_dir")
SECTIONS = ("setup", "step", "checkpointing")
"""Phases of Megatron's loop that the monitor times."""
PATIENCE = 5
"""The monitor waits this many times `--hang-timeout`: our own watchdog acts first, and writes stacks."""


_interrupts = Interrupts()


def build_parser() -> ArgumentParser:
    """Return torchrun's parser."""
    from torch.distributed.run import get_args_parser

    return get_args_parser()


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun, or ft_launcher, with these arguments.

    Returns: 0, or the status of the rank that failed first; 1 if a signal has killed it.
    Raises: ConfigError: `--enable-ft-package` without nvidia-resiliency-ext.
    """
    set_handlers(_hand_on)
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    keep_standard_streams()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    words = list(sys.argv[1:] if argv is None else argv)
    try:
        _launch(words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _tell(rank, failure.exitcode)
    return 0


def _launch(words: list[str]) -> None:
    if "PET_LOG_DIR" in os.environ or Argv(words).before("-m").given(*LOG_FLAGS):
        return _run(words)
    # Torchrun would create its own folder, and not remove it.
    with tempfile.TemporaryDirectory(prefix="torchelastic_", ignore_cleanup_errors=True) as folder:
        _run([f"--log-dir={folder}", *words])


def _run(words: list[str]) -> None:
    if Argv(words).given(hang_monitor.MONITOR_FLAG):
        check_rules(Namespace(enable_ft_package=True))
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = OTHER_SIGNALS
        launcher = importlib.import_module(
            f"{hang_monitor.MONITOR_PACKAGE}.fault_tolerance.launcher"
        )
        launcher.main([*monitor_flags(words), *words])
        return
    from torch.distributed import run

    run.main(["--signals-to-handle", OTHER_SIGNALS, *words])


def _tell(rank: int, status: int) -> int:
    """Report the failed rank in one line (torchrun prints thirty), and return the launcher's status."""
    host = socket.gethostname()
    if status >= 0:
        print(f"error: rank {rank} on {host} ended with status {status}", file=sys.stderr)
        return status
    name = signal.Signals(-status).name
    hint = ": the kernel does that when memory runs out" if name == "SIGKILL" else ""
    print(f"error: rank {rank} on {host} was killed by {name}{hint}", file=sys.stderr)
    return 1


def monitor_flags(words: Sequence[str]) -> list[str]:
    """Return flags for the monitor's timeout of each phase; the user's flags come later and override them.

    >>> monitor_flags(["--nproc-per-node", "8", "--hang-timeout", "60"])[0]
    '--ft-rank-section-timeouts=setup:300,step:300,checkpointing:300'
    """
    wait = PATIENCE * (Argv(words).parsed("--hang-timeout", float) or 480.0)
    sections = ",".join(f"{name}:{wait:g}" for name in SECTIONS)
    return [f"--ft-rank-section-timeouts={sections}", f"--ft-rank-out-of-section-timeout={wait:g}"]


def _hand_on(number: int, frame: FrameType | None) -> None:
    press = _interrupts.press() if number == signal.SIGINT else None
    if is_second := press == "again":
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # a third would interrupt the exit with a traceback
    # A terminal also sends Ctrl-C to ranks in its session; forwarding it would count twice.
    told = number if number in (signal.SIGTERM, signal.SIGUSR1) else signal.SIGTERM
    handed_on = 0
    for child in psutil.Process().children():
        # One that is ending counts: torchrun will see it. If this launcher left first, so would its store,
        # which the launchers of other nodes still need.
        with contextlib.suppress(psutil.Error):
            environment = child.environ()  # empty while it starts another program, or ends
            if environment and "TORCHELASTIC_RUN_ID" not in environment:
                continue  # a monitor, not a rank
            child.send_signal(signal.SIGKILL if is_second else told)
        handed_on += 1
    if is_second:
        print("interrupted twice: the ranks were killed", file=sys.stderr)
        sys.exit(INTERRUPTED_STATUS)
    if not handed_on:
        leave(number, "while no rank was running")
    elif press == "first":
        print("interrupted: the run saves and exits; Ctrl-C again ends it at once", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_tool(main, prints_result=False))
