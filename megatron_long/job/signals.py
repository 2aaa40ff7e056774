"""Signals that ask a run to save and exit: SIGTERM, SIGUSR1 as SLURM may send before the time limit, SIGINT
(Ctrl-C) and SIGHUP (the terminal was closed).

Megatron's handler records one signal and its loop acts on it after the step. `watch` makes the others do the
same; before training begins there is nothing to save, and the process exits at once. A second Ctrl-C exits
at once at any time.

SLURM and terminals send them to every process of a job, also to the helpers that Megatron starts for each
rank, and the last save needs those. Forked ones (writers of `--async-save` on the host, readers of data) have
the rank's handlers, which only record the signal; spawned ones would die of it, and are started within
`withheld`.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker, util
from types import FrameType
from typing import Literal

from megatron_long.job.leaving import tell_others
from megatron_long.job.rendezvous import is_first_process

LEAVE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
INTERRUPTED_STATUS = 130
"""Exit status after a second Ctrl-C."""
LAUNCHER_VARIABLE = "MEGATRON_LONG_LAUNCHER"
"""Contains the process id of `megatron_long.launch`, which sets it for the ranks."""
SAME_KEY_S = 0.5
"""A terminal and a launcher may both forward one Ctrl-C; signals within this time count as one."""


def leave_before_training() -> None:
    """End with status 0 on a signal during the setup of the run."""
    set_handlers(_leave_setup)


def watch(note: Callable[[], None]) -> None:
    """Call `note` on each of `LEAVE_SIGNALS`, from now on."""

    def handle(number: int, frame: FrameType | None) -> None:
        note()

    set_handlers(handle)


def set_handlers(handle: Callable[[int, FrameType | None], None]) -> None:
    """Handle `LEAVE_SIGNALS`, except those that the caller ignores: `nohup`, a shell's `&` in a script."""
    for number in LEAVE_SIGNALS:
        is_ignored = signal.getsignal(number) is signal.SIG_IGN
        if not (is_ignored and number in (signal.SIGINT, signal.SIGHUP)):
            signal.signal(number, handle)


class Interrupts:
    """Counts presses of Ctrl-C."""

    def __init__(self) -> None:
        self._first: float | None = None

    def press(self) -> Literal["first", "same", "again"]:
        """Record one; return whether it is the first, a repetition of the same key press, or another one."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            return "first"
        return "again" if now - self._first > SAME_KEY_S else "same"


def leave_on_second_interrupt() -> None:
    """End this process at once on a second SIGINT, from now on.

    Python's handlers wait until native code, such as a collective, returns; a thread that reads the
    wake-up file does not.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    interrupts = Interrupts()

    def count() -> None:
        while numbers := os.read(reading, 64):
            if signal.SIGINT not in numbers:
                continue
            press = interrupts.press()
            if press == "again":
                _say("interrupted twice: exiting at once, unsaved progress is lost")
                end_at_once(INTERRUPTED_STATUS)
            if press == "first":
                _say(
                    "interrupted: saving after this step, then exiting; Ctrl-C again exits at once"
                )

    threading.Thread(target=count, name="interrupts", daemon=True).start()


def _say(text: str) -> None:
    if is_first_process():
        _write_line(text)


def _write_line(text: str) -> None:
    """Write to standard error, unbuffered: after the terminal is closed, a flush at exit fails."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def end_at_once(status: int) -> None:
    """End this process and its helpers; only temporary files are cleaned up."""
    kill_helpers()
    remove_temporary_folder()
    os._exit(status)


@contextlib.contextmanager
def withheld() -> Iterator[None]:
    """Helper processes started within this context never receive `LEAVE_SIGNALS`.

    The signal mask is inherited when a process is started, so there is no moment at which the signal could
    kill it, as before a handler is set. This process receives pending signals when the block is left.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, LEAVE_SIGNALS)
    try:
        util.get_temp_dir()  # created here: helpers use this process's folder, which is removed when it ends
        resource_tracker.ensure_running()  # is started before every spawned process, and unblocks SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, LEAVE_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def kill_helpers() -> None:
    """Kill the daemons that this process has left; for `atexit`.

    multiprocessing would send SIGTERM, which those of `withheld` do not receive, and wait for their end.
    """
    for helper in multiprocessing.active_children():
        if helper.daemon:
            helper.kill()


def remove_temporary_folder() -> None:
    """Remove the folder `pymp-*` of this process and its helpers, if there is one."""
    folder = multiprocessing.current_process()._config.get("tempdir")  # type: ignore[attr-defined]
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def end_with_parent() -> None:
    """Make this helper process end when the process that started it ends, even by SIGKILL.

    So do those that are forked from it: the fork server of newer Pythons reads the main file instead of
    its children.
    """

    def watch_parent() -> None:
        while (parent := multiprocessing.parent_process()) is None:
            time.sleep(1)  # it is known once the helper has read its start data
        parent.join()
        remove_temporary_folder()
        os._exit(1)

    def start_watching() -> None:
        threading.Thread(target=watch_parent, daemon=True).start()

    start_watching()
    os.register_at_fork(after_in_child=start_watching)


def leave(number: int, when: str) -> None:
    """End with status 0, and say that the signal came when there was nothing to save."""
    _say_nothing_to_save(number, when)
    sys.exit(0)


def leave_with_others() -> None:
    """End with status 0, from any thread, because another rank has left before the first step."""
    _say("another rank left before the first step: nothing to save")
    end_at_once(0)


def _say_nothing_to_save(number: int, when: str) -> None:
    _write_line(f"{signal.Signals(number).name} received {when}: nothing to save")


def _leave_setup(number: int, frame: FrameType | None) -> None:
    for other in LEAVE_SIGNALS:  # a signal from the launcher must not interrupt the exit
        signal.signal(other, signal.SIG_IGN)
    _tell_launcher()
    _say_nothing_to_save(number, "before the first step")
    tell_others()
    sys.exit(0)


def _tell_launcher() -> None:
    """Make the launcher forward SIGTERM: the other ranks would wait for this one, whose status is 0."""
    launcher = os.getppid()
    if os.environ.get(LAUNCHER_VARIABLE) == str(launcher):
        with contextlib.suppress(OSError):
            os.kill(launcher, signal.SIGTERM)
