"""What a run left in its folder, found by what files hold: dataset, training curves, needle and loss."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_long.checkpoint.choosing import RELEASE
from megatron_long.cli import length_tokens
from megatron_long.errors import ConfigError, UserError
from megatron_long.evaluation.loss.loss_report import (
    LossReport,
    difference_between,
    read_loss_report,
)
from megatron_long.evaluation.needle.needle_report import NeedleReport, read_needle_report
from megatron_long.evaluation.ruler.ruler_report import KIND as RULER
from megatron_long.evaluation.ruler.ruler_report import RulerReport, read_ruler_report
from megatron_long.flags.argv import Argv

if TYPE_CHECKING:
    from megatron_long.dataset.manifest import Manifest

EVENTS_PATTERN = "events.out.tfevents*"
LOSS_TAG, BATCH_TAG, RATE_TAG, TIME_TAG = "lm loss", "batch-size", "throughput", "iteration-time"


@dataclass(frozen=True)
class Curve:
    """One training's figures by step; a list is empty where they were not logged."""

    name: str
    steps: list[int]
    losses: list[float]
    """Nats per token."""
    tokens: list[float] = field(default_factory=list)
    """Trained until each step."""
    tokens_per_second: list[tuple[int, float]] = field(default_factory=list)
    """Step and rate until it from the logged step before; the first is missing."""
    is_timed: bool = False
    """Whether the rates are of Megatron's timer, without evaluation and checkpoints."""
    tflops: list[float] = field(default_factory=list)
    """TFLOP/s of a GPU, where `--log-throughput` reached TensorBoard."""
    started: float | None = None
    """When the first step was logged, seconds since 1970; None where that is not known."""


@dataclass(frozen=True)
class Measured[Report]:
    """A report, and how far the training was."""

    path: Path
    report: Report
    iteration: int | None
    """None of what is not a step of a training; see `origin`."""
    tokens: int | None
    model: str
    """Path of what was measured."""
    origin: str
    """The iteration as the report says it: a number, "release" (a converted model), "hf", "random"."""

    @property
    def is_of_training(self) -> bool:
        """Whether it has a place in a training, of which a converted model is the start."""
        return self.iteration is not None or self.origin == RELEASE

    @property
    def label(self) -> str:
        """Its place in the training, in words; its name if it has none."""
        if self.tokens is not None:
            return f"{format_count(self.tokens)} tokens"
        if self.iteration is not None:
            return f"step {self.iteration}"
        return "start" if self.origin == RELEASE else f"{Path(self.model).name} ({self.origin})"


@dataclass
class RunFiles:
    """Everything that was found."""

    folder: Path
    manifest: Manifest | None = None
    dataset: Path | None = None
    curves: list[Curve] = field(default_factory=list)
    needles: list[Measured[NeedleReport]] = field(default_factory=list)
    losses: list[Measured[LossReport]] = field(default_factory=list)
    rulers: list[Measured[RulerReport]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """What looks like ours and could not be read, with the reason."""


def collect(folder: Path, dataset: Path | None = None, baseline: Path | None = None) -> RunFiles:
    """Look through a run's folder.

    Args:
        baseline: Loss report that the others are compared with; None is the first one.
        dataset: Folder of the mixture; None looks for one in `folder` and in what run.json names.
    Raises: ConfigError: no folder there, nothing of a run in it, or a baseline on other documents.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give that of --save, or one around it")
    found = RunFiles(folder)
    for path in sorted(folder.rglob("*.json")):
        _add_report(found, path)
    found.curves = _event_curves(folder)
    found.curves += [curve for curve in _log_curves(found) if not _is_known(curve, found.curves)]
    found.curves = _in_order_of_start(found.curves)
    _add_dataset(found, dataset)
    found.needles = _in_order(found.needles, lambda report: report.settings.model)
    found.losses = _in_order(found.losses, lambda report: report.settings.checkpoint)
    found.rulers = _in_order(found.rulers, lambda report: report.settings["model"])
    if baseline is not None:
        _put_first(found, baseline)
    if not (found.curves or found.needles or found.losses or found.rulers or found.manifest):
        raise ConfigError(
            f"{folder} holds nothing of a run: no TensorBoard events, no --loss-log, no needle, loss or "
            "RULER report, no dataset; give the folder of --save, or one around it"
        )
    return found


def _put_first(found: RunFiles, baseline: Path) -> None:
    report = read_loss_report(baseline, "--baseline")
    others = [item for item in found.losses if item.path.resolve() != baseline.resolve()]
    differences = [difference_between(item.report, report) for item in others]
    if differences and all(differences):
        raise ConfigError(
            f"--baseline {baseline} {differences[-1]} (here is {others[-1].path}, as with every other "
            "loss report of the folder)"
        )
    found.losses = [_measured_loss(found, baseline, report), *others]


def _add_report(found: RunFiles, path: Path) -> None:
    try:
        kind = _kind_of(path)
        if kind == "needle":
            needle = read_needle_report(path)
            model, origin = needle.settings.model, needle.settings.iteration
            found.needles.append(_measured(found, path, needle, model, origin))
        elif kind == "loss_by_position":
            found.losses.append(_measured_loss(found, path, read_loss_report(path)))
        elif kind == RULER:
            ruler = read_ruler_report(path)
            model, origin = ruler.settings["model"], ruler.settings["iteration"]
            found.rulers.append(_measured(found, path, ruler, model, origin))
    except OSError as error:
        found.left_out.append(f"{path} cannot be read ({error.strerror})")
    except UserError as error:
        found.left_out.append(str(error))


def _in_order[Report](
    items: list[Measured[Report]], model_of: Callable[[Report], str]
) -> list[Measured[Report]]:
    """Sort by step within each training, trainings by when they were first measured."""
    first: dict[str, float] = {}
    for item in items:
        model, time = model_of(item.report), item.path.stat().st_mtime
        first[model] = min(time, first.get(model, time))

    def place(item: Measured[Report]) -> tuple[float, int, Path]:
        iteration = -1 if item.iteration is None else item.iteration
        return first[model_of(item.report)], iteration, item.path

    return sorted(items, key=place)


def _kind_of(path: Path) -> str | None:
    """What a JSON file of ours says it is, from its beginning."""
    with path.open("rb") as file:
        head = file.read(200)
    kinds = ("needle", "loss_by_position", RULER)
    return next((kind for kind in kinds if f'"{kind}"'.encode() in head), None)


def _measured_loss(found: RunFiles, path: Path, report: LossReport) -> Measured[LossReport]:
    return _measured(found, path, report, report.settings.checkpoint, report.settings.iteration)


def _measured[Report](
    found: RunFiles, path: Path, report: Report, model: str, origin: str
) -> Measured[Report]:
    tokens = _read_tokens(found, path.with_name("progress.json"))
    return Measured(
        path, report, int(origin) if origin.isdecimal() else None, tokens, model, origin
    )


def _read_tokens(found: RunFiles, progress: Path) -> int | None:
    """Tokens trained, from the file that lies next to an evaluation while training."""
    if not progress.is_file():
        return None
    try:
        return int(json.loads(progress.read_text())["tokens"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (
            f"{progress} does not say the tokens trained ({error!r}); its steps are shown instead"
        )
        if reason not in found.left_out:
            found.left_out.append(reason)
        return None


def _log_curves(found: RunFiles) -> list[Curve]:
    """Curves of `--loss-log` files."""
    curves, folder = [], found.folder
    for path in sorted(folder.rglob("*.jsonl")):
        try:
            records = _read_log(path)
        except OSError as error:
            found.left_out.append(f"{path} cannot be read ({error.strerror})")
            continue
        if records:
            steps = [int(record["iteration"]) for record in records]
            losses = [float(record[LOSS_TAG]) for record in records]
            curves.append(Curve(str(path.relative_to(folder)), steps, losses))
    return curves


def _in_order_of_start(curves: Sequence[Curve]) -> list[Curve]:
    """Sort by when they began; where that is not known of all, by their steps."""
    if all(curve.started is not None for curve in curves):
        return sorted(curves, key=lambda curve: (curve.started or 0.0, curve.name))
    return sorted(curves, key=lambda curve: (curve.steps[0], curve.steps[-1], curve.name))


def _is_known(curve: Curve, others: Sequence[Curve]) -> bool:
    """Whether another curve shows the same training (TensorBoard rounds to float32)."""
    return any(
        curve.steps == other.steps
        and all(abs(a - b) < 1e-4 for a, b in zip(curve.losses, other.losses, strict=True))
        for other in others
    )


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The steps of a loss log, the last record of each; none if it is another file."""
    steps: dict[int, dict[str, Any]] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
                steps[int(record["iteration"])] = record
                float(record[LOSS_TAG])
            except (ValueError, KeyError, TypeError):
                if not steps:
                    return []
    return [record for _, record in sorted(steps.items()) if LOSS_TAG in record]


def _event_curves(folder: Path) -> list[Curve]:
    folders = sorted({path.parent for path in folder.rglob(EVENTS_PATTERN)})
    curves = [_event_curve(events, folder) for events in folders]
    return [curve for curve in curves if curve is not None]


def _event_curve(events: Path, root: Path) -> Curve | None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(events), size_guidance={"scalars": 0, "images": 1}).Reload()
    tags = board.Tags()["scalars"]
    if LOSS_TAG not in tags:
        return None
    losses = {event.step: event for event in board.Scalars(LOSS_TAG)}
    steps = sorted(losses)
    tokens: list[float] = []
    rates: list[tuple[int, float]] = []
    seq_length = _seq_length(events, root)
    if BATCH_TAG in tags and seq_length:
        logged = {event.step: event.value * seq_length for event in board.Scalars(BATCH_TAG)}
        batch = _fill(logged, steps)
        total = 0.0
        for before, step in zip([steps[0] - 1, *steps], steps, strict=False):
            total += batch[step] * (step - before)
            tokens.append(total)
        times = [losses[step].wall_time for step in steps]
        if TIME_TAG in tags:  # without what happened between steps: evaluation, checkpoints
            seconds = {event.step: event.value for event in board.Scalars(TIME_TAG)}
            rates = [(step, batch[step] / seconds[step]) for step in steps[1:] if step in seconds]
        else:
            rates = [
                (steps[i], (tokens[i] - tokens[i - 1]) / max(times[i] - times[i - 1], 1e-9))
                for i in range(1, len(steps))
            ]
    tflops = [event.value for event in board.Scalars(RATE_TAG)] if RATE_TAG in tags else []
    name = str(events.relative_to(root)) if events != root else events.name
    values = [losses[step].value for step in steps]
    started = min(event.wall_time for event in losses.values())
    return Curve(name, steps, values, tokens, rates, TIME_TAG in tags, tflops, started)


def _fill(logged: dict[int, float], steps: Sequence[int]) -> dict[int, float]:
    """Give each step its value, or the last one logged before it (before the first: that one)."""
    filled, last = {}, logged[min(logged)]
    for step in steps:
        last = filled[step] = logged.get(step, last)
    return filled


def _seq_length(events: Path, root: Path) -> int | None:
    """Tokens of a window, from the command of the run that the events lie with."""
    for folder in (events, *events.parents):
        argv = _argv(folder / "run.json")
        if argv:
            return _length_flag(argv, "--seq-length") or _recipe_seq_length(argv)
        if folder == root:
            return None
    return None


def _recipe_seq_length(argv: Argv) -> int | None:
    from megatron_long.flags.recipe import RECIPES

    name = argv.value("--recipe")
    return RECIPES[name]().seq_length if name in RECIPES else None


def _add_dataset(found: RunFiles, dataset: Path | None) -> None:
    from megatron_long.dataset.manifest import read_manifest

    candidates = [dataset] if dataset is not None else _dataset_candidates(found.folder)
    for path in candidates:
        try:
            found.manifest, found.dataset = read_manifest(path), path
            return
        except UserError as error:
            if dataset is not None:
                raise
            found.left_out.append(str(error))


def _dataset_candidates(folder: Path) -> list[Path]:
    """The dataset of the newest run, then what lies in the folder."""
    files = [path for path in folder.rglob("run.json") if path.is_file()]
    runs = sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)
    named = [Path(path) for run in runs if (path := _argv(run).value("--dataset"))]
    nearby = [path.parent for path in sorted(folder.rglob("manifest.json"))]
    return [path for path in dict.fromkeys([*named, *nearby]) if (path / "manifest.json").is_file()]


def _argv(path: Path) -> Argv:
    if not path.is_file():
        return Argv()
    try:
        return Argv(str(word) for word in json.loads(path.read_text())["argv"])
    except (ValueError, KeyError, TypeError):
        return Argv()


def _length_flag(argv: Argv, flag: str) -> int | None:
    try:
        return length_tokens(argv.value(flag) or "")
    except argparse.ArgumentTypeError:
        return None


def format_count(number: float) -> str:
    """Write a number of tokens short.

    >>> format_count(2_500_000_000), format_count(4_194_304), format_count(512)
    ('2.5B', '4.19M', '512')
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
