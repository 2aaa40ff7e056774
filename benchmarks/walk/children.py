"""A phase's commands: their output with the time of every line in one log, and their termination."""

import contextlib
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.walk.settings import REPOSITORY

POLL_S = 0.05
NUM_LOG_LINES = 60
SECONDS_TO_DIE = 60
"""A killed process gives up its GPU memory, which takes a while."""


STOP = threading.Event()
"""Set when this program is to end: every command is then killed, in any thread."""


class PhaseFailed(Exception):
    """A phase has failed."""


class OutOfTime(Exception):
    """The time limit of --until-s was reached."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int | None
    """None if it was killed intentionally."""
    seconds: float
    lines: list[tuple[float, str]]
    """Output, each line with its second since the start."""


class Child:
    """A running command, its output read line by line."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.command = [str(word) for word in command]
        self.lines: list[tuple[float, str]] = []
        self.started = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a", encoding="utf-8")
        self._log.write(f"$ {shlex.join(self.command)}\n")
        self.process = subprocess.Popen(
            self.command,
            env=dict(environment),
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # universal newlines: each update of a bar is a line
            stamp = self.seconds
            self.lines.append((stamp, line.rstrip("\n")))
            self._log.write(f"{stamp:9.3f} {line.rstrip()}\n")
            self._log.flush()

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.started

    def saw(self, text: str) -> bool:
        """Whether any line so far holds the text."""
        return any(text in line for _, line in list(self.lines))

    def kill(self) -> None:
        """SIGKILL to the command and all its descendants, as when a node is lost."""
        try:
            root = psutil.Process(self.process.pid)
            tree = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            tree = []
        for process in tree:
            _kill(process.pid)
        psutil.wait_procs(tree[1:], timeout=SECONDS_TO_DIE)
        self.process.wait()

    def end(self, *, killed: bool = False) -> Ended:
        """Wait for the last line; returns all lines."""
        status = self.process.wait()
        seconds = self.seconds
        self._reader.join(timeout=20)  # a helper that outlives the launcher holds the pipe
        self._log.write(f"{seconds:9.3f} (status {status})\n")
        self._log.flush()
        return Ended(None if killed else status, seconds, list(self.lines))


def run(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    *,
    deadline: float | None = None,
    watch: Callable[[Child], bool] | None = None,
) -> Ended:
    """Run a command to its end.

    Args:
        watch: Called repeatedly while it runs; True kills it.
        deadline: `time.monotonic()` at which it is killed and `OutOfTime` raised.
    Raises: PhaseFailed: its status is not 0. OutOfTime.
    """
    child = Child(command, log, environment)
    try:
        while child.process.poll() is None:
            if watch is not None and watch(child):
                child.kill()
                return child.end(killed=True)
            if STOP.is_set() or (deadline is not None and time.monotonic() > deadline):
                raise OutOfTime(f"stopped after {child.seconds:.0f} s: {shlex.join(child.command)}")
            time.sleep(POLL_S)
    except BaseException:
        child.kill()
        child.end(killed=True)
        raise
    ended = child.end()
    if ended.status:
        raise PhaseFailed(f"status {ended.status}: {shlex.join(child.command)}")
    return ended


def tail(log: Path, num_lines: int = NUM_LOG_LINES) -> str:
    """The last lines of a log."""
    if not log.is_file():
        return "(no log)"
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
