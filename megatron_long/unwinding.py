"""Signals that end a tool as Ctrl-C does: by an exception, so that what is half written is removed."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def unwound_by_signals() -> Iterator[None]:
    """Within it, SIGTERM and SIGHUP raise `SystemExit` with 128 and their number, as a shell reports them.

    One is enough: those that follow are ignored while files are removed. For the main thread.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        for other in ENDING:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
