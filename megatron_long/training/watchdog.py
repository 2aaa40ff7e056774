"""Ends a process that gives no sign of life, with the stack of every thread.

The timer is faulthandler's own thread: it needs no Python lock, so it fires while native code holds it. A
rank that hangs keeps the others waiting in a collective, so every rank's timer runs out, and each writes
its stacks.
"""

import contextlib
import faulthandler
import logging
import sys
import threading
import time
from pathlib import Path
from typing import IO

STACKS_FOLDER = "stacks"
LONG_PHASE = 4
"""How many times as long a phase may take that is no ordinary step: start, first step, saving."""

logger = logging.getLogger(__name__)


class Watchdog:
    """Waits for `beat`; without one for long enough, writes stacks and ends the process with status 1.

    Args:
        timeout_s: How long a step may take between two micro-batches; 0 watches nothing.
        folder: Gets `stacks/rank_00003.txt`; None writes to standard error.
        rank: This process.
    """

    def __init__(self, timeout_s: float, folder: Path | None, rank: int) -> None:
        self.timeout_s, self.rank = timeout_s, rank
        self.path: Path | None = None
        self._file: IO[str] | None = None
        self._ends_at = float("inf")
        self._least_times: float = LONG_PHASE
        self._stopped = threading.Event()
        if not timeout_s:
            return
        if folder is not None:
            self.path = folder / STACKS_FOLDER / f"rank_{rank:05d}.txt"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", encoding="utf-8")
        threading.Thread(target=self._announce, name="watchdog", daemon=True).start()
        self.beat()

    def beat(self, times: float = 1) -> None:
        """Say that this process is alive; the next sign may take `times` as long as usual.

        Until the first step is done it may always take `LONG_PHASE` times as long: each micro-batch of that
        step may be the first to compile kernels or to meet another rank.
        """
        if not self.timeout_s:
            return
        wait = self.timeout_s * max(times, self._least_times)
        self._ends_at = time.monotonic() + wait
        faulthandler.dump_traceback_later(wait, exit=True, file=self._file or sys.stderr)

    def end_step(self) -> None:
        """Say that a step is done."""
        self._least_times = 1
        self.beat()

    def stop(self) -> None:
        """Watch no more, and remove the empty file."""
        if not self.timeout_s:
            return
        faulthandler.cancel_dump_traceback_later()
        self._ends_at = float("inf")
        self._stopped.set()
        if self._file is not None and self.path is not None:
            self._file.close()
            with contextlib.suppress(OSError):
                self.path.unlink()
                self.path.parent.rmdir()  # the last process to leave

    def _announce(self) -> None:
        """Say in the log what is about to happen, where Python still runs."""
        lead_s = min(2.0, self.timeout_s / 4)
        while not self._stopped.wait(lead_s / 2):
            if time.monotonic() > self._ends_at - lead_s:
                logger.error(
                    "rank %d has given no sign of life for too long (--hang-timeout %g s); it ends now, the "
                    "stacks of its threads are in %s",
                    self.rank,
                    self.timeout_s,
                    self.path or "the lines below",
                )
                return
