"""The phases of the walk by name: what each runs, what it needs, and what it leaves to be told.

Each gives facts for its record; `moved_gb` are bytes that it moved, for GB/s.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.walk.children import PhaseFailed
from benchmarks.walk.context import Context
from benchmarks.walk.settings import LAUNCH_ENVIRONMENT, Work, layout_argv
from benchmarks.walk.training import async_save, reshard, resume, train, uninterrupted

SHORT_LENGTH = 8192
"""Tokens of the documents on which transformers and Megatron are compared."""
NUM_SCORED = 2
"""Documents of each source that are scored."""


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
    """By source, on the checkpoint as it is sharded."""
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
    """One row of the grid: the longest context at ten depths."""
    work = context.work
    folder = work.results / "needle"
    context.run(
        [
            *_launcher(work),
            *("tools/evaluate_needle.py", "--checkpoint", work.run, "--haystack", work.haystack),
            *("--context-lengths", work.settings.seq_length, "--num-depths", 10, "--force"),
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
    length = min(SHORT_LENGTH, work.settings.seq_length)
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
    from megatron_long.evaluation.loss_report import read_loss_report

    found = read_loss_report(report).loss
    sums = sum(values.sum() for values in found.loss_sums.values())
    return float(sums / sum(values.sum() for values in found.token_counts.values()))


@dataclass(frozen=True)
class Phase:
    """One phase."""

    do: Callable[[Context], dict[str, Any]]
    needs: tuple[str, ...]
    expected_s: float
    """At full size on four H200; other sizes are scaled."""
    models: float = 0
    """Model folders (16 GB at full size) that it writes to --fast-dir, or to WORK."""
    checkpoints: float = 0
    """Checkpoints with optimizer (112 GB) that it writes to WORK."""


PHASES: dict[str, Phase] = {
    "data": Phase(data, (), 300),
    "write-hf": Phase(write_hf, (), 60, models=1),
    "convert": Phase(convert, ("write-hf",), 150, models=1),
    "disk": Phase(disk, (), 90, checkpoints=0.15),
    "train": Phase(train, ("convert",), 420, checkpoints=1),
    "resume": Phase(resume, ("train",), 200),
    "reshard": Phase(reshard, ("train",), 200),
    "uninterrupted": Phase(uninterrupted, ("convert",), 150),
    "loss": Phase(loss, ("train",), 120),
    "needle": Phase(needle, ("train",), 120),
    "export": Phase(export, ("train",), 90, models=1),
    "transformers": Phase(transformers, ("export",), 120),
    "async": Phase(async_save, ("convert",), 400, checkpoints=1),
}
"""In the order of a whole walk. `async` gives the losses that `uninterrupted` would, and removes the
checkpoint of `train`."""
READERS_OF_TRAIN = ("resume", "reshard", "loss", "needle", "export", "transformers")
