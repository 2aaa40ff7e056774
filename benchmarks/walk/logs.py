"""Figures of a training log: times of a start, saves, loads, steps, memory."""

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

Lines = Sequence[tuple[float, str]]
"""Output of a command: seconds since its start, and the line."""

START_MARKS = (
    ("ranks imported, checkpoint's hashes compared", r"^using world size"),
    ("Megatron initialised", r"after megatron is initialized"),
    ("model and optimizer built", r"loading .*checkpoint from"),
    ("checkpoint loaded", r"successfully loaded checkpoint"),
    ("main copy taken, dataset opened", r"after dataloaders are built"),
    ("first step begins", r"before the start of training step"),
)
"""Events that a log line marks, in their order."""
STEP = re.compile(
    r"iteration\s+(?P<step>\d+)/.*elapsed time per iteration \(ms\): (?P<ms>[\d.]+)"
    r"(?:.*throughput per GPU \(TFLOP/s/GPU\): (?P<tflops>[\d.]+))?"
)
MAX_ALLOCATED = re.compile(r"max allocated: ([\d.]+)")
SAVING = re.compile(r"saving checkpoint at iteration\s+(\d+)")
SAVED = re.compile(r"successfully saved checkpoint from iteration\s+(\d+)")
SCHEDULED = re.compile(r"scheduled an async checkpoint save at iteration\s+(\d+)")
LOADING = re.compile(r"loading .*checkpoint from")
LOADED = re.compile(r"successfully loaded checkpoint")


def start_times(lines: Lines) -> dict[str, float]:
    """Seconds of each part of a start, up to the first step.

    >>> lines = [(9.0, "using world size: 4"), (11.0, "x after dataloaders are built")]
    >>> start_times(lines)
    {"ranks imported, checkpoint's hashes compared": 9.0, 'main copy taken, dataset opened': 2.0}
    """
    parts: dict[str, float] = {}
    before = 0.0
    for name, pattern in START_MARKS:
        found = next((stamp for stamp, line in lines if re.search(pattern, line)), None)
        if found is not None:
            parts[name] = round(found - before, 2)
            before = found
    return parts


def step_figures(lines: Lines) -> dict[int, dict[str, float]]:
    """By step: time of its line, its seconds by Megatron's timer, TFLOP/s per GPU if logged."""
    found: dict[int, dict[str, float]] = {}
    for stamp, line in lines:
        match = STEP.search(line)
        if match:
            figures = {"at": round(stamp, 2), "s": round(float(match["ms"]) / 1e3, 3)}
            if match["tflops"]:
                figures["tflops"] = float(match["tflops"])
            found[int(match["step"])] = figures
    return found


def saves(lines: Lines) -> dict[int, float]:
    """Seconds from the start of each save to its final name, including hashes, by iteration."""
    begun: dict[int, float] = {}
    took: dict[int, float] = {}
    for stamp, line in lines:
        if match := SAVING.search(line):
            begun.setdefault(int(match[1]), stamp)
        elif match := SAVED.search(line):
            number = int(match[1])
            took[number] = round(stamp - begun.get(number, stamp), 2)
    return took


def first_scheduled(lines: Lines) -> int | None:
    """The step after which the first save in the background began."""
    found = (SCHEDULED.search(line) for _, line in lines)
    return next((int(match[1]) for match in found if match), None)


def load_seconds(lines: Lines) -> float | None:
    """Seconds from Megatron's first line about loading to the last, without the hashes before it."""
    begun = next((stamp for stamp, line in lines if LOADING.search(line)), None)
    ended = next((stamp for stamp, line in lines if LOADED.search(line)), None)
    return None if begun is None or ended is None else round(ended - begun, 2)


def pauses(lines: Lines, saved_at: int) -> dict[int, float]:
    """By step after a save: additional seconds between its line and the previous one.

    The baseline is the median of the steps from the second to the save. Megatron's own timer excludes the
    save's beginning and counts its end, so wall-clock time is used.
    """
    at = {step: figures["at"] for step, figures in step_figures(lines).items()}
    gaps = {step: at[step] - at[step - 1] for step in at if step - 1 in at}
    before = [gap for step, gap in gaps.items() if step <= saved_at]
    usual = statistics.median(before) if before else 0.0
    return {step: round(max(0.0, gap - usual), 2) for step, gap in gaps.items() if step > saved_at}


def peak_gpu_gib(lines: Lines) -> float | None:
    """Largest allocated memory reported by torch, over the ranks that report it."""
    found = [float(value) for _, line in lines for value in MAX_ALLOCATED.findall(line)]
    return round(max(found) / 1024, 1) if found else None


def read_losses(path: Path, offset: int = 0) -> dict[int, float]:
    """Unrounded loss by step, of a --loss-log from a byte offset; the later one if a step is logged twice."""
    if not path.is_file():
        return {}
    text = path.read_bytes()[offset:].decode()
    records = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return {record["iteration"]: record["lm loss"] for record in records}
