"""Signals that end a tool as Ctrl-C does: by an exception, so that partial output is removed."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@contextlib.contextmanager
def unwound_by_signals() -> Iterator[None]:
    """Within it, SIGTERM and SIGHUP raise `SystemExit` with 128 and their number, as a shell reports them.

    SIGINT (Ctrl-C) raises `KeyboardInterrupt` as usual. Any other exception on the way out, such as from a
    writer that misses the end of its file, is replaced by these. One signal is enough: later ones are ignored
    while files are removed. Signals that are ignored already stay ignored (`nohup`). For the main thread.
    """
    received: list[int] = []

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        received.append(number)
        raise _exit_of(number)

    heeded = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.getsignal(number) for number in heeded}
    try:
        for number in heeded:
            signal.signal(number, leave)
        yield
    except Exception:
        if received:
            raise _exit_of(received[0]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_of(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
