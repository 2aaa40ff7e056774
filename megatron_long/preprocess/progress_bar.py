"""Bars for people: bytes of the corpus with the rate of tokens, and a line for each source."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from megatron_long.corpus.listing import Listing, describe_inputs
from megatron_long.preprocess.monitor import RunProgress

LINE_SECONDS = 30.0


class ProgressBars:
    """Shows a run on a terminal; in a log, a line now and then."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not self._is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._stage = ""
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def update(self, progress: RunProgress) -> None:
        """Show how far a run is."""
        if progress.stage != self._stage:
            self._stage, self._start = progress.stage, time.monotonic()
        seconds = max(time.monotonic() - self._start, 1e-3)
        text = describe(progress, seconds)
        if self._is_terminal:
            self._set("all", progress.read_bytes, progress.total_bytes, text)
            for name, tokens in progress.tokens_by_source.items():
                rate = f"{tokens / 1e6:.1f}M tokens, {tokens / seconds / 1e6:.2f}M/s"
                self._set(name, tokens, progress.expected_by_source.get(name), rate)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def _set(self, name: str, done: float, total: float | None, text: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, text=text)
        total = None if total is None else max(total, done)
        self._bars.update(self._tasks[name], completed=done, total=total, text=text)


def print_listing(listing: Listing) -> None:
    """Print which files are read, and which are not."""
    print(*describe_inputs(listing), sep="\n", file=sys.stderr, flush=True)


def describe(progress: RunProgress, seconds: float) -> str:
    """Give one line on a run.

    >>> describe(RunProgress("tokens.0", 1, 4, 10_000_000, 40_000_000, 30_000_000, 8_000_000), 2.0)
    'tokens.0: 1 of 4 files, 10.0 of 40.0 MB, 4.00M tokens/s, 6 s left'
    """
    left = seconds * (progress.total_bytes - progress.read_bytes) / max(progress.read_bytes, 1)
    return (
        f"{progress.stage}: {progress.files_done} of {progress.files_total} files, "
        f"{progress.read_bytes / 1e6:.1f} of {progress.total_bytes / 1e6:.1f} MB, "
        f"{progress.tokens / seconds / 1e6:.2f}M tokens/s, {left:.0f} s left"
    )
