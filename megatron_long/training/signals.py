"""Signals that ask a run to save and leave: SIGTERM, and SIGUSR1 as SLURM may send before the time limit.

Megatron's handler notes one signal and its loop acts on it after the step. `watch` lets the other one do the
same; before training begins there is nothing to save, and the process leaves at once.

SLURM sends them to every process of a step, also to the helpers that Megatron starts beside a rank, and the
last save needs those. Forked ones (writers of `--async-save` on the host, readers of data) have the rank's
handlers, which only take a note; spawned ones would die of the signal, and are started within `withheld`.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from types import FrameType

LEAVE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def leave_before_training() -> None:
    """End with status 0 on a signal that comes while the run is still being set up."""
    for number in LEAVE_SIGNALS:
        signal.signal(number, _leave_setup)


def watch(note: Callable[[], None]) -> None:
    """Call `note` on each of `LEAVE_SIGNALS`, from now on."""

    def handle(number: int, frame: FrameType | None) -> None:
        note()

    for number in LEAVE_SIGNALS:
        signal.signal(number, handle)


@contextlib.contextmanager
def withheld() -> Iterator[None]:
    """Start helper processes within, and `LEAVE_SIGNALS` never reach them.

    The mask is inherited when a process is started, so that there is no moment at which the signal could kill
    it, as before a handler is set. This process gets what was sent meanwhile when the block is left.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, LEAVE_SIGNALS)
    try:
        resource_tracker.ensure_running()  # goes before every spawned process, and unblocks SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, LEAVE_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def kill_helpers() -> None:
    """Kill the daemons that this process has left; for `atexit`.

    multiprocessing would send SIGTERM, which those of `withheld` do not see, and wait for their end.
    """
    for helper in multiprocessing.active_children():
        if helper.daemon:
            helper.kill()


def end_with_parent() -> None:
    """Let this helper process end when the process that started it is gone, even by SIGKILL.

    So do those that are forked from it: the fork server of newer Pythons reads the main file in the place of
    its children.
    """

    def watch_parent() -> None:
        while (parent := multiprocessing.parent_process()) is None:
            time.sleep(1)  # it is known once the helper has read all it is started with
        parent.join()
        os._exit(1)

    def start_watching() -> None:
        threading.Thread(target=watch_parent, daemon=True).start()

    start_watching()
    os.register_at_fork(after_in_child=start_watching)


def leave(number: int, when: str) -> None:
    """End with status 0, and say that the signal came when there was nothing to save."""
    name = signal.Signals(number).name
    print(f"{name} came {when}: nothing to save", file=sys.stderr, flush=True)
    sys.exit(0)


def _leave_setup(number: int, frame: FrameType | None) -> None:
    leave(number, "before the first step")
