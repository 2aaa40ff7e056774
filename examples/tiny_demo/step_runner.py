"""Run one command: everything goes to a log file, the terminal gets results and a progress line."""

import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

ITERATION = re.compile(r"iteration\s+(\d+)/\s*(\d+) .*lm loss: ([\d.E+-]+|nan|inf)")
PROGRESS_BAR = re.compile(r"\d+%\|.*\|")
MEGATRON_CHATTER = re.compile(
    r"^\s*(INFO|WARNING|DEBUG)\b|^\s*[-=>\[(]|^\s*[\w ]+\.{3,}|^\s*(setting|using|loading|checkpoint|"
    r"successfully|saving|done|number|sharded\w*|Job|time|building|finished|Number|load|save|training)\b"
)
"""Lines of Megatron's start-up that stay in the log file."""
SECONDS_BETWEEN_LINES = 10.0
"""Interval of progress lines if the output is not a terminal."""


def progress_text(line: str) -> str | None:
    """Return the short form of a line that reports progress, None for any other.

    >>> progress_text(" [now] iteration       20/      30 | x: 1 | lm loss: 7.027833E+00 | y")
    'iteration 20/30  loss 7.028'
    >>> progress_text(" 46%|####   | 13/28 [00:13<00:14]")
    '46%|####   | 13/28 [00:13<00:14]'
    """
    if found := ITERATION.search(line):
        return f"iteration {found[1]}/{found[2]}  loss {float(found[3]):.3f}"
    return line.strip() if PROGRESS_BAR.search(line) else None


class Terminal:
    """Shows result lines, and the latest progress in one line that is overwritten."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._is_live = stream.isatty()
        self._shown_at = 0.0
        self._lock = threading.Lock()

    def progress(self, text: str) -> None:
        """Show the latest progress."""
        with self._lock:
            if self._is_live:
                width = shutil.get_terminal_size().columns - 3
                self._stream.write(f"\r\x1b[K  {text[:width]}")
            elif time.monotonic() - self._shown_at >= SECONDS_BETWEEN_LINES:
                self._shown_at = time.monotonic()
                self._stream.write(f"  {text}\n")
            self._stream.flush()

    def line(self, text: str) -> None:
        """Show a line that stays."""
        with self._lock:
            self._stream.write(f"{self._clear()}  {text.rstrip()}\n")
            self._stream.flush()

    def close(self) -> None:
        """Take the progress line away."""
        self._stream.write(self._clear())
        self._stream.flush()

    def _clear(self) -> str:
        return "\r\x1b[K" if self._is_live else ""


def run_command(
    command: Sequence[str], log: Path, environment: Mapping[str, str], *, show_output: bool = True
) -> int:
    """Run a command to its end, its output in `log`.

    Args:
        command: Program and arguments.
        log: File for all it prints; replaced.
        environment: Environment of the command.
        show_output: Whether to show the lines of its standard output besides its progress.
    Returns: Exit status.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    terminal = Terminal(sys.stdout)
    with log.open("w", encoding="utf-8") as log_file:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        assert process.stderr is not None
        errors = threading.Thread(
            target=_follow, args=(process.stderr, log_file, terminal, False), daemon=True
        )
        errors.start()
        try:
            _follow(process.stdout, log_file, terminal, show_output)
            errors.join()
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            terminal.close()


def _follow(stream: IO[str], log_file: IO[str], terminal: Terminal, show_lines: bool) -> None:
    """Copy a stream to the log; universal newlines make each update of a progress bar a line."""
    in_arguments = False
    for line in stream:
        log_file.write(line)
        log_file.flush()
        text = progress_text(line)
        if text is not None:
            terminal.progress(text)
        in_arguments = (
            in_arguments or "--- arguments ---" in line
        ) and "end of arguments" not in line
        if show_lines and text is None and not in_arguments and _is_result(line):
            terminal.line(line)


def _is_result(line: str) -> bool:
    return bool(line.strip()) and not MEGATRON_CHATTER.search(line)
