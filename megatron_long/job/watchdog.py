"""Ends a job that sends no heartbeat, with the stacks of every thread of every process.

The first process to detect a hang notifies the others through the job's store. Each writes its stacks,
reports that, and exits when all have, or after a time limit. So none is ended by the exit of another before
it has written.

Native code that holds the GIL stops both threads of this class. Then faulthandler's own thread, which does
not need it, writes and ends the process, `GRACE_S` later than the threads would: by then the process that
watches this one has detected the missing heartbeat and the others have written. If even writing blocks, as on
a file system that no longer responds, the kernel ends the process.
"""

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from megatron_long.job.rendezvous import share

STACKS_FOLDER = "stacks"
LONG_PHASE = 4
"""Factor for the time limit of phases other than ordinary steps: start, first step, saving."""
POLL_S = 1.0
"""How often a process checks its own time and the store; an eighth of the timeout if that is less."""
GRACE_S = 10.0
"""Time for every process that can run Python to write its stacks once one has detected a hang."""
ANSWER_S = 60.0
"""How long a process that has written waits for those that do not respond."""
LAST_S = 30.0
"""Time after that until the kernel ends a process that cannot end by itself."""
LEFT = -1
"""What a process sends to the one that watches it when it stops."""

logger = logging.getLogger(__name__)


class Watchdog:
    """Waits for `beat`; without one for long enough, all processes write stacks and end with status 1.

    Args:
        timeout_s: How long a step may take between two micro-batches; 0 watches nothing.
        folder: Where to write `stacks/rank_00003.txt`; None writes to standard error.
        rank: This process.
        connect: Returns a separate connection to the store that all processes of the job share, as
            `rendezvous.connect`; not called in a job of one process.
    """

    def __init__(
        self,
        timeout_s: float,
        folder: Path | None,
        rank: int,
        connect: Callable[[], Any] | None = None,
    ) -> None:
        self.timeout_s, self.rank = timeout_s, rank
        self.path: Path | None = None
        self._file: IO[str] | None = None
        self._ends_at = float("inf")
        self._least_times: float = LONG_PHASE
        self._poll_s = min(POLL_S, timeout_s / 8)
        self._reason = "was asked for its stacks: another process of the job detected a hang"
        self._stopped, self._alarm = threading.Event(), threading.Event()
        self._written, self._complete = threading.Event(), threading.Event()
        self._listener: threading.Thread | None = None
        if not timeout_s:
            return
        if folder is not None:
            self.path = folder / STACKS_FOLDER / f"rank_{rank:05d}.txt"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")  # keeps those from before a restart
        self.beat()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        if connect is None or share()[1] == 1:
            self._complete.set()
            return
        self._listener = threading.Thread(
            target=self._listen, args=(connect,), name="watchdog's listener", daemon=True
        )
        self._listener.start()

    def beat(self, times: float = 1) -> None:
        """Report that this process is alive; the next heartbeat may take `times` as long as usual.

        Until the first step is done it may take `LONG_PHASE` times as long: each micro-batch of that
        step may be the first to compile kernels or to meet another rank.
        """
        if not self.timeout_s:
            return
        wait = self.timeout_s * max(times, self._least_times)
        self._ends_at = time.monotonic() + wait
        self._arm(wait)

    def end_step(self) -> None:
        """Report that a step is done."""
        self._least_times = 1
        self.beat()

    def stop(self) -> None:
        """Stop watching, and remove the empty file; after a detected hang, end the process.

        The latter happens if the end of another process raises an exception here.
        """
        if not self.timeout_s:
            return
        if self._alarm.is_set():
            self._complete.wait(GRACE_S)
            os._exit(1)
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._stopped.set()
        if self._listener is not None:
            self._listener.join(GRACE_S)
        if self._file is not None and self.path is not None:
            self._file.close()
            with contextlib.suppress(OSError):
                if not self.path.stat().st_size:
                    self.path.unlink()
                self.path.parent.rmdir()  # the last process to exit

    def _arm(self, wait: float) -> None:
        """Set what ends this process when Python cannot: faulthandler's thread, and later the kernel."""
        stream = self._file or sys.stderr
        faulthandler.dump_traceback_later(wait + GRACE_S, exit=True, file=stream)
        signal.setitimer(signal.ITIMER_REAL, wait + GRACE_S + ANSWER_S + LAST_S)

    def _watch(self) -> None:
        """Write stacks when this process is late or is asked to; does not wait for the store."""
        while not self._alarm.wait(self._poll_s):
            if self._stopped.is_set():
                return
            if time.monotonic() > self._ends_at:
                self._raise_alarm(f"has sent no heartbeat for too long ({self._limit()})")
        stream = self._file or sys.stderr
        self._arm(ANSWER_S)
        stream.write(f"{time.strftime('%F %T')}: rank {self.rank} {self._reason}\n")
        stream.flush()
        faulthandler.dump_traceback(stream, all_threads=True)
        self._written.set()
        where = self.path or "the lines above"
        logger.error(
            "rank %d %s; the stacks of its threads are in %s", *(self.rank, self._reason, where)
        )
        self._complete.wait(ANSWER_S)
        os._exit(1)

    def _raise_alarm(self, reason: str) -> None:
        self._reason = reason
        self._alarm.set()

    def _limit(self) -> str:
        return f"--hang-timeout {self.timeout_s:g} s"

    def _listen(self, connect: Callable[[], Any]) -> None:
        """Exchange heartbeats with the others until this process ends."""
        talk = Talk(self.rank, share()[1], 2 * self._poll_s)
        store: Any = None
        while not self._stopped.wait(self._poll_s):
            try:
                store = store or connect()
                talk.publish(store, self._ends_at)
                if not self._alarm.is_set() and talk.is_alarmed(store):
                    self._alarm.set()
                elif not self._alarm.is_set() and talk.is_silent(store):
                    self._raise_alarm(
                        f"has received no heartbeat from rank {talk.watched} ({self._limit()})"
                    )
                if self._alarm.is_set():
                    talk.alarm(store)
                if self._written.is_set() and talk.all_are_done(store):
                    self._complete.set()
            except RuntimeError:  # torch's DistError
                store = None
                if self._written.is_set():  # its host has exited, after all had written
                    self._complete.set()
        with contextlib.suppress(RuntimeError):
            talk.leave(store or connect())


class Talk:
    """Messages between processes in the store; each watches the one of the next rank.

    Args:
        rank: This process.
        world_size: How many there are.
        slack_s: How much later than announced a heartbeat may come.
    """

    def __init__(self, rank: int, world_size: int, slack_s: float) -> None:
        self.rank, self.world_size, self.slack_s = rank, world_size, slack_s
        self.watched = (rank + 1) % world_size
        self._heard = 0
        self._due = float("inf")
        self._has_alarmed = self._is_done = False

    def publish(self, store: Any, ends_at: float) -> None:
        """Send how much time this process has left, in milliseconds, because clocks of nodes differ."""
        left = int(1000 * (ends_at - time.monotonic()))
        store.set(f"left/{self.rank}", str(max(1, left)))

    def is_silent(self, store: Any) -> bool:
        """Whether the watched process has sent no heartbeat for longer than its time limit."""
        heard, now = store.add(f"left/{self.watched}", 0), time.monotonic()
        if heard == LEFT:
            self._due = float("inf")
        elif heard != self._heard:
            self._due = now + heard / 1000 + self.slack_s
        self._heard = heard
        return now > self._due

    def is_alarmed(self, store: Any) -> bool:
        """Whether any process has detected a hang."""
        return store.add("alarm", 0) > 0

    def alarm(self, store: Any) -> None:
        """Notify the others of a hang."""
        if not self._has_alarmed:
            store.add("alarm", 1)
            self._has_alarmed = True

    def all_are_done(self, store: Any) -> bool:
        """Report that this process has written its stacks; return whether all have, or have exited."""
        done = store.add("done", 0 if self._is_done else 1)
        self._is_done = True
        return done >= self.world_size

    def leave(self, store: Any) -> None:
        """Report that this process need not be watched or waited for."""
        store.set(f"left/{self.rank}", str(LEFT))
        if not self._is_done:
            store.add("done", 1)
