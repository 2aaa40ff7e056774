"""Needle results as a file and as text, and the grid they are measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_long.errors import ConfigError
from megatron_long.evaluation.needle.needle_scores import NeedleResult
from megatron_long.files import atomic_path

FORMAT_VERSION = 4
"""Goes up when cells of the same settings become others: unfinished runs are then not continued."""

SHORTEST_TOKENS = 1024
"""Default shortest case, but not above an eighth of the longest."""


@dataclass(frozen=True, kw_only=True)
class NeedleSettings:
    """What was measured."""

    model: str
    """Folder of the checkpoint or HF model, or the config of a freshly initialised one."""
    backend: str
    """`megatron` or `hf`."""
    iteration: str
    """Training iteration of the checkpoint, "release" for a converted one, "random" or "hf"."""
    precision: str | None
    haystack_sha256: str
    vocabulary_sha256: str
    prompt: str
    tasks: Mapping[str, Any]
    """Names of the tasks and what `describe_task` says of each."""
    context_lengths: tuple[int, ...]
    """Tokens of the whole case, the answer included."""
    depths: tuple[float, ...]
    num_seeds: int = 1
    training_length: int | None = None
    """Context the checkpoint was trained at, tokens, if said."""
    megatron_argv: tuple[str, ...] = ()
    """Flags for Megatron, but for those of the layout."""
    layout_argv: tuple[str, ...] = ()
    weights_sha256: str | None = None
    """Fingerprint of the weights; None during training."""
    weights: str = "model"
    """Which of the checkpoint's weights: `main` is the optimizer's copy, before FP8 rounded it."""

    def identity(self) -> dict[str, Any]:
        """What decides the cells; how they are computed and drawn does not."""
        values = {"format_version": FORMAT_VERSION, **asdict(self)}
        for name in (
            "training_length",
            "layout_argv",
            "weights",
        ):  # the fingerprint tells weights apart
            del values[name]
        return values

    @property
    def num_cells(self) -> int:
        """Cells of the whole grid."""
        return len(self.tasks) * self.num_seeds * len(self.context_lengths) * len(self.depths)


@dataclass(frozen=True)
class NeedleReport:
    """One measurement."""

    settings: NeedleSettings
    results: list[NeedleResult]


def spread_lengths(shortest: int | None, longest: int, number: int) -> tuple[int, ...]:
    """Give context lengths at equal distances, the longest always among them.

    >>> spread_lengths(None, 131072, 5)
    (1024, 33536, 66048, 98560, 131072)
    >>> spread_lengths(None, 2048, 1)
    (2048,)

    Raises: ConfigError: the shortest is above the longest.
    """
    shortest = shortest or min(SHORTEST_TOKENS, longest // 8)
    if shortest > longest:
        raise ConfigError(
            f"--min-length {shortest} is above --context-length {longest}; give a smaller one"
        )
    lengths = np.linspace(longest, shortest, number).round().astype(int)
    return tuple(sorted({int(length) for length in lengths}))


def spread_depths(number: int) -> tuple[float, ...]:
    """Give depths from 0 to 1 at equal distances; a single one is in the middle.

    >>> spread_depths(3), spread_depths(1)
    ((0.0, 0.5, 1.0), (0.5,))
    """
    return tuple(np.linspace(0.0, 1.0, number).tolist()) if number > 1 else (0.5,)


def summarize(
    results: Sequence[NeedleResult], training_length: int | None
) -> dict[str, dict[str, float]]:
    """Give the means over all cells, and within and beyond the training length if it is known."""
    parts = {"all": list(results)}
    if training_length is not None:
        parts["within"] = [r for r in results if r.context_length <= training_length]
        parts["beyond"] = [r for r in results if r.context_length > training_length]
    return {name: _means(part) for name, part in parts.items() if part}


def _means(part: Sequence[NeedleResult]) -> dict[str, float]:
    means = {
        "num_cells": len(part),
        "exact_match": float(np.mean([r.is_exact for r in part])),
        "token_accuracy": float(np.mean([r.token_accuracy for r in part])),
        "log_likelihood": float(np.mean([r.log_likelihood for r in part])),
    }
    for name in ("rouge1", "answer_words"):
        values = [value for r in part if (value := getattr(r, name)) is not None]
        if values:
            means[name] = float(np.mean(values))
    return means


def format_summary(report: NeedleReport) -> str:
    """Give the means as text: all cells, each side of the training length, and each task if several."""
    length = report.settings.training_length
    names = {"all": "all", "within": f"up to {length}", "beyond": f"beyond {length}"}
    rows = [(names[name], means) for name, means in summarize(report.results, length).items()]
    tasks = list(dict.fromkeys(result.task for result in report.results))
    if len(tasks) > 1:
        rows += [(task, _means([r for r in report.results if r.task == task])) for task in tasks]
    lines = [f"{'context (tokens)':<18}{'cells':>6}{'exact':>8}{'tokens':>8}{'nats/token':>12}"]
    is_generated = any("rouge1" in means for _, means in rows)
    if is_generated:
        lines[0] += f"{'ROUGE-1':>9}{'words':>8}"
    for name, means in rows:
        line = (
            f"{name:<18}{means['num_cells']:>6}{means['exact_match']:>8.1%}"
            f"{means['token_accuracy']:>8.1%}{means['log_likelihood']:>12.3f}"
        )
        if "rouge1" in means:
            line += f"{means['rouge1']:>9.3f}{means['answer_words']:>8.1%}"
        lines.append(line)
    return "\n".join(lines)


def write_needle_report(path: Path, report: NeedleReport) -> None:
    """Write a report as JSON, whole or not at all."""
    tasks = {
        task: summarize(
            [r for r in report.results if r.task == task], report.settings.training_length
        )
        for task in report.settings.tasks
    }
    content = {
        "format_version": FORMAT_VERSION,
        "kind": "needle",
        "units": {"log_likelihood": "nats per answer token", "context_length": "tokens"},
        "settings": asdict(report.settings),
        "is_complete": len(report.results) == report.settings.num_cells,
        "means": summarize(report.results, report.settings.training_length),
        "means_by_task": {task: means for task, means in tasks.items() if means},
        "cells": [asdict(result) for result in report.results],
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_needle_report(path: Path) -> NeedleReport:
    """Read what `write_needle_report` wrote.

    Raises: ConfigError: missing, or not such a report.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; give a JSON written by evaluate_needle.py")
    try:
        content = json.loads(path.read_text())
        settings = content["settings"]
        for name in ("context_lengths", "depths", "megatron_argv", "layout_argv"):
            settings[name] = tuple(settings[name])
        results = [NeedleResult(**cell) for cell in content["cells"]]
        return NeedleReport(NeedleSettings(**settings), results)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a needle report of this version ({error!r}); give a JSON written by "
            "evaluate_needle.py"
        ) from error
