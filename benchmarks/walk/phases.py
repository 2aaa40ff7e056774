"""The phases of the walk by name: what each runs, needs and records.

Each returns facts for its record; `moved_gb` is the amount of data it moved, for GB/s.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.walk.budget import Cost
from benchmarks.walk.children import PhaseFailed
from benchmarks.walk.context import Context
from benchmarks.walk.settings import LAUNCH_ENVIRONMENT, Work, layout_argv
from benchmarks.walk.training import async_save, reshard, resume, train, uninterrupted

SHORT_LENGTH = 8192
"""Tokens of the documents on which transformers and Megatron are compared."""
NUM_SCORED = 2
"""Documents of each source that are scored."""
NUM_DEPTHS = 5
"""Of the needle."""


def data(context: Context) -> dict[str, Any]:
    """Text, tokenizer and dataset; on a machine with the packages of preprocessing."""
    work = context.work
    length, small = work.settings.seq_length, not work.settings.is_full
    command = [work.python, "-m", "benchmarks.walk.data", "--output", work.data_folder]
    command += ["--seq-length", length, "--num-windows", 16]
    if work.corpus:
        command += ["--corpus", work.corpus, "--haystack", _haystack_of(work.corpus)]
        command += ["--allow-repeat", 10]
    if small:
        command += ["--valid-tokens", 8 * length, "--vocab-size", 1024]
    context.run(command)
    return {}


def _haystack_of(corpus: Path) -> Path:
    found = sorted((corpus / "heldout").glob("*.txt"))
    if not found:
        raise PhaseFailed(f"--corpus {corpus} has no heldout/*.txt, the haystack of the needle")
    return found[0]


def write_hf(context: Context) -> dict[str, Any]:
    """The Hugging Face folder."""
    work, settings = context.work, context.work.settings
    context.remove(work.hf, "of a command that was stopped")
    layers = ["--layers", settings.layers] if settings.layers else []
    context.run(
        [
            *(work.python, "-m", "benchmarks.walk.hf_model", "--output", work.hf),
            *("--tokenizer", work.dataset / "tokenizer", "--size", settings.size, *layers),
        ]
    )
    return {"moved_gb": settings.model_gb}


def convert(context: Context) -> dict[str, Any]:
    """To Megatron, verified."""
    work = context.work
    context.run(
        [
            *(work.python, "tools/convert_checkpoint.py", "hf-to-megatron", "--verify", "--force"),
            *("--input", work.hf, "--output", work.base),
        ]
    )
    return {"moved_gb": work.settings.model_gb}


def disk(context: Context) -> dict[str, Any]:
    """Streaming, hashing and reading at this disk."""
    work = context.work
    folder = work.folder / "disk"
    context.remove(folder, "of a command that was stopped")
    size = 16.0 if work.settings.is_full else 0.1
    ended = context.run(
        [
            *(work.python, "-m", "benchmarks.walk.disk", "--folder", folder, "--gb", size),
            *("--streams", work.settings.processes),
        ]
    )
    rates = json.loads(ended.lines[-1][1])
    return {"rates_gb_per_s": {name: round(rate, 2) for name, rate in rates.items()}}


def loss(context: Context) -> dict[str, Any]:
    """By source, on the sharded checkpoint."""
    work = context.work
    report = work.results / "loss.json"
    _evaluate(context, report, work.settings.seq_length)
    return {"mean_loss": _mean_loss(report)}


def _evaluate(context: Context, report: Path, length: int, *more: object) -> None:
    work = context.work
    context.run(
        [
            *_launcher(work),
            *("tools/evaluate_loss.py", "--checkpoint", work.run, "--dataset", work.dataset),
            *("--context-length", length, "--max-documents-per-source", NUM_SCORED, *more),
            *("--output", report, "--force", *layout_argv(work.settings.layout)),
        ],
        environment=LAUNCH_ENVIRONMENT,
    )


def needle(context: Context) -> dict[str, Any]:
    """One row of the grid: the longest context at some depths."""
    work = context.work
    folder = work.results / "needle"
    context.run(
        [
            *_launcher(work),
            *("tools/evaluate_needle.py", "--checkpoint", work.run, "--haystack", work.haystack),
            *("--context-lengths", work.settings.seq_length, "--num-depths", NUM_DEPTHS, "--force"),
            *("--output-dir", folder, *layout_argv(work.settings.layout)),
        ],
        environment=LAUNCH_ENVIRONMENT,
    )
    return {"cells": len((folder / "cells.jsonl").read_text().splitlines()) - 1}


def export(context: Context) -> dict[str, Any]:
    """Back to a Hugging Face folder."""
    work = context.work
    context.run(
        [
            *(work.python, "tools/convert_checkpoint.py", "megatron-to-hf", "--force"),
            *("--input", work.run, "--output", work.export),
        ]
    )
    return {"moved_gb": work.settings.model_gb}


def transformers(context: Context) -> dict[str, Any]:
    """Loss of the same documents in Megatron and in transformers."""
    work = context.work
    length = SHORT_LENGTH if work.settings.is_full else work.settings.seq_length // 4
    chosen = ("--min-document-tokens", length + 1)
    ours, theirs = work.results / "loss-short.json", work.results / "loss-transformers.json"
    _evaluate(context, ours, length, *chosen)
    context.run(
        [
            *(
                work.python,
                "tools/evaluate_loss.py",
                "--backend",
                "hf",
                "--checkpoint",
                work.export,
            ),
            *("--dataset", work.dataset, "--context-length", length, *chosen),
            *("--max-documents-per-source", NUM_SCORED, "--output", theirs, "--force"),
        ]
    )
    seen, expected = _mean_loss(theirs), _mean_loss(ours)
    return {"megatron": expected, "transformers": seen, "difference": abs(seen - expected)}


def _launcher(work: Work) -> tuple[object, ...]:
    run_module = (work.python, "-m", "torch.distributed.run", "--standalone")
    return (*run_module, "--nproc-per-node", work.settings.processes)


def _mean_loss(report: Path) -> float:
    from megatron_long.evaluation.loss.loss_report import read_loss_report

    found = read_loss_report(report).loss
    sums = sum(values.sum() for values in found.loss_sums.values())
    return float(sums / sum(values.sum() for values in found.token_counts.values()))


@dataclass(frozen=True)
class Phase:
    """One phase."""

    do: Callable[[Context], dict[str, Any]]
    needs: tuple[str, ...]
    cost: Cost
    """At full size on four H100, alone; fewer layers are scaled."""
    models: float = 0
    """Model folders (16 GB at full size) that it writes to --fast-dir, or to WORK."""
    checkpoints: float = 0
    """Checkpoints with optimizer (112 GB) that it writes to WORK."""


PHASES: dict[str, Phase] = {
    "data": Phase(data, (), Cost(other=300)),
    "write-hf": Phase(write_hf, (), Cost(other=20), models=1),
    "convert": Phase(convert, ("write-hf",), Cost(other=115), models=1),
    "disk": Phase(disk, (), Cost(other=30), checkpoints=0.15),
    "train": Phase(train, ("convert",), Cost(trainings=1, steps=1, saves=1), checkpoints=1),
    "resume": Phase(resume, ("train",), Cost(trainings=1, steps=1, loads=1)),
    "uninterrupted": Phase(uninterrupted, ("convert",), Cost(trainings=1, steps=3)),
    "export": Phase(export, ("train",), Cost(other=45), models=1),
    "loss": Phase(loss, ("train",), Cost(evaluations=1, other=45)),
    "needle": Phase(needle, ("train",), Cost(evaluations=1, other=45)),
    "transformers": Phase(transformers, ("export",), Cost(evaluations=1, other=60)),
    "reshard": Phase(reshard, ("train",), Cost(trainings=1, steps=1, loads=1)),
    "async": Phase(
        async_save, ("convert",), Cost(trainings=1, steps=3, saves=1, other=30), checkpoints=1
    ),
}
"""In order of importance. `async` gives the losses that `uninterrupted` would, and removes the
checkpoint of `train`."""
GROUPS = (
    ("write-hf",),
    ("convert", "disk"),
    ("train",),
    ("resume",),
    ("uninterrupted", "export"),
    ("loss", "needle", "transformers"),
    ("reshard",),
    ("async",),
)
"""The order without --phases; those of a group run concurrently. At most one of each group needs the
GPUs for itself, or all of them fit into 80 GB together."""
READERS_OF_TRAIN = ("resume", "reshard", "loss", "needle", "export", "transformers")
