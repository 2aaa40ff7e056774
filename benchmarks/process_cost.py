"""The cost of a command: processor time and memory of its whole process tree, on one core."""

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_long.errors import DataError

SAMPLE_INTERVAL_S = 0.05


@dataclass(frozen=True)
class Cost:
    """The cost of one run, with all processes it started."""

    cpu_s: float
    wall_s: float
    peak_rss_bytes: int
    """Largest sum of resident memory over the tree, mapped files included."""
    peak_private_bytes: int
    """The same without pages of files and shared memory."""
    output: str


def run_on_core(
    command: Sequence[str | Path], core: int, log: Path, env: Mapping[str, str] | None = None
) -> Cost:
    """Run a command with all its processes on one core.

    Args:
        log: File for the command's stderr.
    Raises: DataError: it failed; names the log.
    """
    words = [str(word) for word in command]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    with open(log, "wb") as errors:
        process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            | dict(env or {}),
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        rss, private = _watch(process)
        output = process.stdout.read().decode() if process.stdout else ""
        status = process.wait()
    wall_s = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if status != 0:
        raise DataError(f"{' '.join(words)} ended with status {status}; see {log}")
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cpu_s, wall_s, rss, private, output)


def python(*words: str | Path) -> list[str | Path]:
    """Return the command that runs a script with this Python."""
    return [sys.executable, *words]


def remove_folder(folder: Path) -> None:
    """Remove a folder if it exists."""
    shutil.rmtree(folder, ignore_errors=True)


def _watch(process: subprocess.Popen) -> tuple[int, int]:
    """Sample the memory of a process and its descendants until it ends."""
    root, peak_rss, peak_private = psutil.Process(process.pid), 0, 0
    while process.poll() is None:
        rss = private = 0
        try:
            for one in [root, *root.children(recursive=True)]:
                info = one.memory_info()
                rss += info.rss
                private += info.rss - info.shared
        except psutil.Error:
            pass  # a process ended while it was sampled
        peak_rss, peak_private = max(peak_rss, rss), max(peak_private, private)
        time.sleep(SAMPLE_INTERVAL_S)
    return peak_rss, peak_private
