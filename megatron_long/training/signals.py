"""Signals that ask a run to save and leave: SIGTERM, and SIGUSR1 as SLURM may send before the time limit.

Megatron's handler notes one signal and its loop acts on it after the step. `watch` lets the other one do the
same; before training begins there is nothing to save, and the process leaves at once.
"""

import signal
import sys
from collections.abc import Callable
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


def leave(number: int, when: str) -> None:
    """End with status 0, and say that the signal came when there was nothing to save."""
    name = signal.Signals(number).name
    print(f"{name} came {when}: nothing to save", file=sys.stderr, flush=True)
    sys.exit(0)


def _leave_setup(number: int, frame: FrameType | None) -> None:
    leave(number, "before the first step")
