"""What a run left in its folder, found by what files hold: dataset, training curves, needle and loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_long.errors import ConfigError, UserError
from megatron_long.evaluation.loss_report import LossReport, read_loss_report
from megatron_long.evaluation.needle_report import NeedleReport, read_needle_report

if TYPE_CHECKING:
    from megatron_long.data.manifest import Manifest

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
    tokens_per_second: list[float] = field(default_factory=list)
    """Between a step and the one before; the first is missing."""
    tflops: list[float] = field(default_factory=list)
    """TFLOP/s of a GPU, where `--log-throughput` reached TensorBoard."""


@dataclass(frozen=True)
class Measured[Report]:
    """A report, and how far the training was."""

    path: Path
    report: Report
    iteration: int | None
    """None of a converted checkpoint, taken as the start."""
    tokens: int | None

    @property
    def label(self) -> str:
        """Its place in the training, in words."""
        if self.tokens is not None:
            return f"{format_count(self.tokens)} tokens"
        return f"step {self.iteration}" if self.iteration is not None else "start"


@dataclass
class RunFiles:
    """Everything that was found."""

    folder: Path
    manifest: Manifest | None = None
    dataset: Path | None = None
    curves: list[Curve] = field(default_factory=list)
    needles: list[Measured[NeedleReport]] = field(default_factory=list)
    losses: list[Measured[LossReport]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Files that look like ours and could not be read, with the reason."""


def collect(folder: Path, dataset: Path | None = None, baseline: Path | None = None) -> RunFiles:
    """Look through a run's folder.

    Args:
        baseline: Loss report that the others are compared with; None is the first one.
        dataset: Folder of the mixture; None looks for one in `folder` and in what run.json names.
    Raises: ConfigError: no folder there, or nothing of a run in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give that of --save, or one around it")
    found = RunFiles(folder)
    for path in sorted(folder.rglob("*.json")):
        _add_report(found, path)
    found.curves = _event_curves(folder)
    found.curves += [curve for curve in _log_curves(folder) if not _is_known(curve, found.curves)]
    _add_dataset(found, dataset)
    found.needles = _in_order(found.needles, lambda report: report.settings.model)
    found.losses = _in_order(found.losses, lambda report: report.settings.checkpoint)
    if baseline is not None:
        report = read_loss_report(baseline, "--baseline")
        first = _measured(baseline, report, report.settings.iteration)
        others = [item for item in found.losses if item.path.resolve() != baseline.resolve()]
        found.losses = [first, *others]
    if not (found.curves or found.needles or found.losses or found.manifest):
        raise ConfigError(
            f"{folder} holds nothing of a run: no TensorBoard events, no --loss-log, no needle or loss "
            "report, no dataset; give the folder of --save, or one around it"
        )
    return found


def _add_report(found: RunFiles, path: Path) -> None:
    kind = _kind_of(path)
    try:
        if kind == "needle":
            needle = read_needle_report(path)
            found.needles.append(_measured(path, needle, needle.settings.iteration))
        elif kind == "loss_by_position":
            loss = read_loss_report(path)
            found.losses.append(_measured(path, loss, loss.settings.iteration))
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
    return next(
        (kind for kind in ("needle", "loss_by_position") if f'"{kind}"'.encode() in head), None
    )


def _measured[Report](path: Path, report: Report, iteration: str) -> Measured[Report]:
    progress = path.with_name("progress.json")
    tokens = json.loads(progress.read_text())["tokens"] if progress.is_file() else None
    return Measured(path, report, int(iteration) if iteration.isdecimal() else None, tokens)


def _log_curves(folder: Path) -> list[Curve]:
    """Curves of `--loss-log` files."""
    curves = []
    for path in sorted(folder.rglob("*.jsonl")):
        records = _read_log(path)
        if records:
            steps = [int(record["iteration"]) for record in records]
            losses = [float(record[LOSS_TAG]) for record in records]
            curves.append(Curve(str(path.relative_to(folder)), steps, losses))
    return curves


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
    rates: list[float] = []
    seq_length = _seq_length(events, root)
    if BATCH_TAG in tags and seq_length:
        batch = {event.step: event.value * seq_length for event in board.Scalars(BATCH_TAG)}
        total = 0.0
        for before, step in zip([steps[0] - 1, *steps], steps, strict=False):
            total += batch.get(step, 0.0) * (step - before)
            tokens.append(total)
        times = [losses[step].wall_time for step in steps]
        if TIME_TAG in tags:  # without what happened between steps: evaluation, checkpoints
            seconds = {event.step: event.value for event in board.Scalars(TIME_TAG)}
            rates = [batch[step] / seconds[step] for step in steps[1:] if step in seconds]
        else:
            rates = [
                (tokens[i] - tokens[i - 1]) / max(times[i] - times[i - 1], 1e-9)
                for i in range(1, len(steps))
            ]
    tflops = [event.value for event in board.Scalars(RATE_TAG)] if RATE_TAG in tags else []
    name = str(events.relative_to(root)) if events != root else events.name
    return Curve(name, steps, [losses[step].value for step in steps], tokens, rates, tflops)


def _seq_length(events: Path, root: Path) -> int | None:
    """Tokens of a window, from the command of the run that the events lie with."""
    for folder in (events, *events.parents):
        argv = _argv(folder / "run.json")
        if argv:
            return _int_flag(argv, "--seq-length") or _recipe_seq_length(argv)
        if folder == root:
            return None
    return None


def _recipe_seq_length(argv: Sequence[str]) -> int | None:
    from megatron_long.training.recipe import RECIPES

    name = _flag(argv, "--recipe")
    return RECIPES[name]().seq_length if name in RECIPES else None


def _add_dataset(found: RunFiles, dataset: Path | None) -> None:
    from megatron_long.data.manifest import read_manifest

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
    runs = sorted(folder.rglob("run.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    named = [Path(path) for run in runs if (path := _flag(_argv(run), "--dataset"))]
    nearby = [path.parent for path in sorted(folder.rglob("manifest.json"))]
    return [path for path in dict.fromkeys([*named, *nearby]) if (path / "manifest.json").is_file()]


def _argv(path: Path) -> list[str]:
    if not path.is_file():
        return []
    try:
        return [str(word) for word in json.loads(path.read_text())["argv"]]
    except (ValueError, KeyError, TypeError):
        return []


def _flag(argv: Sequence[str], flag: str) -> str | None:
    from megatron_long.evaluation.inputs import read_flag

    return read_flag(argv, flag)


def _int_flag(argv: Sequence[str], flag: str) -> int | None:
    value = _flag(argv, flag)
    return int(value) if value and value.isdecimal() else None


def format_count(number: float) -> str:
    """Write a number of tokens short.

    >>> format_count(2_500_000_000), format_count(4_194_304), format_count(512)
    ('2.5B', '4.19M', '512')
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
