"""RULER's results as a file and as text: by task and length, averages, the effective length."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_long.errors import ConfigError
from megatron_long.evaluation.generation.sample_results import (
    Estimate,
    SampleResult,
    estimate_average,
    estimate_task,
)
from megatron_long.evaluation.ruler.ruler_definitions import RULER_TASKS, THRESHOLD_PERCENT
from megatron_long.files import atomic_path

KIND = "ruler"
FORMAT_VERSION = 1
"""Goes up when samples of the same settings become others: unfinished runs are then not continued."""


@dataclass(frozen=True)
class RulerReport:
    """One measurement."""

    settings: Mapping[str, Any]
    """What decides the samples and the answers; `model`, `iteration`, `tasks`, `context_lengths` among it."""
    estimates: Mapping[tuple[str, int], Estimate]
    """By task and length, tokens."""
    averages: Mapping[int, Estimate]
    """By length, over the tasks."""
    is_complete: bool

    @property
    def tasks(self) -> Sequence[str]:
        """Tasks that were asked."""
        return self.settings["tasks"]

    @property
    def lengths(self) -> Sequence[int]:
        """Context lengths, tokens, ascending."""
        return self.settings["context_lengths"]


def make_report(settings: Mapping[str, Any], results: Sequence[SampleResult]) -> RulerReport:
    """Add up rows."""
    cells = {
        (task, length): [r for r in results if (r.task, r.context_length) == (task, length)]
        for task in settings["tasks"]
        for length in settings["context_lengths"]
    }
    averages = {
        length: estimate_average([cells[task, length] for task in settings["tasks"]])
        for length in settings["context_lengths"]
    }
    estimates = {key: estimate_task(rows) for key, rows in cells.items()}
    is_complete = len(results) == settings["num_samples"] * len(cells)
    return RulerReport(settings, estimates, averages, is_complete)


def effective_length(report: RulerReport) -> str:
    """Say up to which length the average reaches RULER's threshold, there and at all shorter lengths.

    The paper compares averages of all 13 tasks from 4K on, rounded to one decimal.
    """
    if set(report.tasks) != set(RULER_TASKS):
        return f"no effective length: it takes all {len(RULER_TASKS)} tasks, here are {len(report.tasks)}"
    best, is_near = None, False
    for length in report.lengths:
        average = report.averages[length]
        if average.mean is None or not report.is_complete:
            return f"no effective length: not every task has a score at {length}"
        assert average.low is not None
        assert average.high is not None
        is_near |= average.low <= THRESHOLD_PERCENT <= average.high
        if round(average.mean, 1) < THRESHOLD_PERCENT:
            break
        best = length
    said = f"below {report.lengths[0]}" if best is None else str(best)
    if best == report.lengths[-1]:
        said += " or more, the longest measured"
    doubt = "; an interval includes the threshold, so more samples may change it" if is_near else ""
    return f"effective length (average of at least {THRESHOLD_PERCENT}): {said}{doubt}"


def notes(report: RulerReport) -> list[str]:
    """Say what keeps scores from being those of the model."""
    said = []
    for (task, length), cell in report.estimates.items():
        if cell.num_samples and cell.num_empty == cell.num_samples - cell.num_unscored > 0:
            said.append(
                f"{task} at {length}: every answer is empty, so it has no score; the model ends the "
                "text at once, as after a chat template that is not its own (--template)"
            )
        elif cell.num_empty:
            said.append(f"{task} at {length}: {cell.num_empty} answers are empty, and count as 0")
        if cell.num_unscored:
            said.append(
                f"{task} at {length}: {cell.num_unscored} of {cell.num_samples} samples have no score: "
                "their answer takes more tokens than are generated (--tokens-to-generate)"
            )
    return said


def table_rows(report: RulerReport) -> list[list[str]]:
    """Give a header and a row for each task, and one for the average."""
    rows = [["task", *map(str, report.lengths)]]
    for task in report.tasks:
        rows.append([task, *(str(report.estimates[task, length]) for length in report.lengths)])
    return [*rows, ["average", *(str(report.averages[length]) for length in report.lengths)]]


def format_report(report: RulerReport) -> str:
    """Give the table as text, with what is to be said of it."""
    rows = table_rows(report)
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return "\n".join([*lines, effective_length(report), *notes(report)])


def write_ruler_report(path: Path, report: RulerReport) -> None:
    """Write a report as JSON, whole or not at all; rows lie next to it."""
    content = {
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        "units": {"mean, low, high": "percent", "context_length": "tokens"},
        "settings": dict(report.settings),
        "is_complete": report.is_complete,
        "effective_length": effective_length(report),
        "notes": notes(report),
        "averages": [
            {"context_length": length, **asdict(cell)} for length, cell in report.averages.items()
        ],
        "estimates": [
            {"task": task, "context_length": length, **asdict(cell)}
            for (task, length), cell in report.estimates.items()
        ],
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_ruler_report(path: Path) -> RulerReport:
    """Read what `write_ruler_report` wrote.

    Raises: ConfigError: not such a report.
    """
    try:
        content = json.loads(path.read_text())
        estimates, averages = {}, {}
        for cell in content["estimates"]:
            key = cell.pop("task"), cell.pop("context_length")
            estimates[key] = Estimate(**cell)
        for cell in content["averages"]:
            length = cell.pop("context_length")
            averages[length] = Estimate(**cell)
        return RulerReport(content["settings"], estimates, averages, content["is_complete"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a report of evaluate_ruler.py of this version ({error!r}); make it again"
        ) from error
