"""Bars for people: bytes of the corpus with the rate of tokens, and a line for each source."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from megatron_long.corpus.listing import Listing, describe_inputs
from megatron_long.dataset.tables import short_count
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
            console=Console(stderr=True),
            disable=not self._is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def update(self, progress: RunProgress) -> None:
        """Show how far a run is."""
        text = describe(progress)
        if self._is_terminal:
            is_measured = progress.is_finished or progress.total_bytes or progress.files_total
            share = 1.0 if progress.is_finished else progress.share
            self._set(progress.stage, share, 1.0 if is_measured else None, text)
            seconds = max(progress.seconds, 1e-3)
            for name, tokens in progress.tokens_by_source.items():
                made = tokens - progress.resumed_tokens_by_source.get(name, 0)
                rate = f", {short_count(made / seconds)}/s" * bool(made)
                counted = f"{short_count(tokens)} tokens{rate}"
                self._set(name, tokens, progress.expected_by_source.get(name), counted)
        elif progress.is_finished or time.monotonic() - self._last_line >= LINE_SECONDS:
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


def describe(progress: RunProgress) -> str:
    """Give one line on a run.

    >>> describe(RunProgress("tokens.0", 1, 4, 10_000_000, 40_000_000, 30_000_000, 8_000_000, seconds=2.0))
    'tokens.0: 1 of 4 files, 10.0 of 40.0 MB, 4.00M tokens/s, 2 s so far'
    >>> describe(RunProgress("write", 1, 4, seconds=200.0, left_s=600.0))
    'write: 1 of 4 files, 200 s so far, about 10 min left'
    >>> describe(RunProgress("tokens.0", 4, 4, tokens=8_000_000, resumed_tokens_by_source={"a": 8_000_000}))
    'tokens.0: 4 of 4 files, 8.00M tokens of an earlier run, 0 s so far'
    >>> describe(RunProgress("plan", seconds=31.0, is_finished=True))
    'plan: done in 31 s'
    """
    parts = []
    if progress.files_total:
        parts.append(f"{progress.files_done} of {progress.files_total} files")
    if progress.total_bytes:
        parts.append(f"{progress.read_bytes / 1e6:.1f} of {progress.total_bytes / 1e6:.1f} MB")
    if progress.tokens:
        made = progress.tokens - progress.resumed_tokens
        rate = f"{short_count(made / max(progress.seconds, 1e-3))} tokens/s"
        parts.append(rate if made else f"{short_count(progress.tokens)} tokens of an earlier run")
    time_so_far = format_seconds(progress.seconds)
    parts.append(f"done in {time_so_far}" if progress.is_finished else f"{time_so_far} so far")
    if progress.left_s is not None and not progress.is_finished:
        parts.append(f"about {format_seconds(progress.left_s)} left")
    return f"{progress.stage}: {', '.join(parts)}"


def format_seconds(seconds: float) -> str:
    """Give a time in a unit of its size.

    >>> format_seconds(299.6), format_seconds(300), format_seconds(7_200), format_seconds(72_795)
    ('300 s', '5 min', '2.0 h', '20.2 h')
    """
    if seconds < 300:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
