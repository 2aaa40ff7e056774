"""Loss by source and position from flags to report: by the command on a checkpoint, or in training.

Both ask by a `LossRequest`, plan by `plan_loss` and score by `run_loss`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_long.errors import DataError
from megatron_long.evaluation.batches import TokenScorer
from megatron_long.evaluation.input_checks import (
    check_context_length,
    check_dataset_vocabulary,
    check_output,
    open_tokenizer,
)
from megatron_long.evaluation.loss.held_out import HeldOutDocument, open_held_out, select_documents
from megatron_long.evaluation.loss.loss_report import (
    LossReport,
    LossSettings,
    check_comparable,
    read_loss_report,
    write_loss_report,
)
from megatron_long.evaluation.loss.loss_table import distinct_names, table_paths
from megatron_long.evaluation.loss.plain_text import hash_texts, open_texts
from megatron_long.evaluation.loss.position_loss import (
    PositionLoss,
    count_positions,
    default_buckets,
    loss_by_position,
    parse_buckets,
)
from megatron_long.evaluation.models import (
    MeasuredModel,
    ModelChoice,
    choose_model,
    warn_beyond_rope,
)
from megatron_long.evaluation.report.plots import plot_position_curves

if TYPE_CHECKING:
    from megatron_long.dataset.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class LossRequest:
    """What is to be measured, as flags say it."""

    dataset: str | None
    """Dataset folder whose held-out documents are scored."""
    texts: tuple[Path, ...] = ()
    """Text files instead."""
    context_length: int
    """Tokens taken of each document."""
    buckets: str | None = None
    """Intervals of positions as `parse_buckets` reads them; None takes `default_buckets`."""
    min_document_tokens: int = 2
    max_documents_per_source: int | None = None
    training_length: int | None = None

    @classmethod
    def of_command(cls, args: argparse.Namespace) -> LossRequest:
        """Take the flags of `evaluate_loss.py`."""
        return cls(
            dataset=None if args.dataset is None else str(args.dataset),
            texts=tuple(args.text or ()),
            context_length=args.context_length,
            buckets=args.buckets,
            min_document_tokens=args.min_document_tokens,
            max_documents_per_source=args.max_documents_per_source,
            training_length=args.training_length,
        )

    @classmethod
    def of_training(cls, args: argparse.Namespace, dataset: str) -> LossRequest:
        """Take the flags of training: those of `EvaluationArguments` and --seq-length."""
        return cls(
            dataset=dataset,
            context_length=args.seq_length,
            max_documents_per_source=args.position_loss_documents,
        )


@dataclass(frozen=True)
class LossPlan:
    """All that is known before a model scores."""

    settings: LossSettings
    documents: list[HeldOutDocument]


def prepare_loss(
    args: argparse.Namespace, megatron_argv: Sequence[str]
) -> tuple[ModelChoice, LossPlan, list[tuple[str, LossReport]]]:
    """Check everything that can be wrong with a command, and give what is to be measured.

    Args:
        args: Flags of `evaluate_loss.py`.
        megatron_argv: Flags for Megatron.
    Returns: The model, the plan, and the reports to compare with, by name, the baseline first.
    Raises: ConfigError, DataError: see what is called.
    """
    tables = table_paths(args.output) if args.compare else ()
    outputs = [("--output", args.output), ("--plot", args.plot)]
    for flag, path in (*outputs, *(("--output", table) for table in tables)):
        if path is not None:
            check_output(path, force=args.force, flag=flag)
    request = LossRequest.of_command(args)
    check_context_length(request.context_length, megatron_argv)
    choice = choose_model(args, megatron_argv)
    documents, fingerprint = _open_for(choice, request, args.tokenizer)
    plan = plan_loss(request, choice.measured(), documents, fingerprint)
    names = distinct_names(args.compare)
    earlier = [
        (name, read_loss_report(path)) for name, path in zip(names, args.compare, strict=True)
    ]
    counts = count_positions(documents, request.context_length, plan.settings.buckets)
    for path, (_, report) in zip(args.compare, earlier, strict=True):
        check_comparable(plan.settings, counts, report, path)
    warn_beyond_rope(choice, request.context_length)
    return choice, plan, earlier


def _open_for(
    choice: ModelChoice, request: LossRequest, tokenizer_path: Path | None
) -> tuple[list[HeldOutDocument], str]:
    """Give the rows to score, whose tokens are the model's, and a hash of where they come from."""
    length = request.context_length
    if request.dataset is None:
        tokenizer, texts = open_tokenizer(tokenizer_path, choice.folder), request.texts
        rows = open_texts(texts, tokenizer, length, request.max_documents_per_source)
        return rows, hash_texts(texts, tokenizer.vocabulary_sha256, length)
    from megatron_long.dataset.manifest import read_manifest, verify_files

    dataset = Path(request.dataset)
    if not dataset.is_dir():
        raise DataError(f"--dataset {dataset} is not a folder; give one of preprocess_mix.py")
    manifest = read_manifest(dataset)
    check_dataset_vocabulary(
        manifest.tokenizer.vocab_size,
        manifest.tokenizer.vocabulary_sha256,
        dataset,
        tokenizer_path,
        choice.folder,
    )
    verify_files(dataset, manifest, held_out_only=True)
    return held_out_documents(request, manifest), manifest.fingerprint


def held_out_documents(request: LossRequest, manifest: Manifest) -> list[HeldOutDocument]:
    """Give the documents of the dataset to score.

    Raises: DataError: there are none, none is long enough, or a file is damaged.
    """
    assert request.dataset is not None
    return select_documents(
        open_held_out(Path(request.dataset), manifest),
        min_document_tokens=request.min_document_tokens,
        max_documents_per_source=request.max_documents_per_source,
    )


def plan_loss(
    request: LossRequest,
    model: MeasuredModel,
    documents: list[HeldOutDocument],
    fingerprint: str,
) -> LossPlan:
    """Say what is measured, so that reports can be compared, or refused.

    Args:
        fingerprint: A hash of where the documents come from.
    Raises: ConfigError: buckets that are none.
    """
    length, buckets = request.context_length, request.buckets
    settings = LossSettings(
        checkpoint=model.path,
        iteration=model.iteration,
        dataset=request.dataset or " ".join(map(str, request.texts)),
        dataset_fingerprint=fingerprint,
        context_length=length,
        buckets=parse_buckets(buckets, length) if buckets else default_buckets(length),
        min_document_tokens=request.min_document_tokens,
        max_documents_per_source=request.max_documents_per_source,
        training_length=request.training_length,
        megatron_argv=model.megatron_argv,
        weights=model.weights,
    )
    return LossPlan(settings, documents)


def run_loss(
    plan: LossPlan,
    scorer: TokenScorer,
    *,
    micro_batch_size: int = 1,
    on_scored: Callable[[], object] = lambda: None,
) -> LossReport:
    """Score all documents; every process of the job calls this.

    Args:
        on_scored: Called after each document of this rank.
    Raises: DataError: see `loss_by_position`.
    """
    loss = loss_by_position(
        scorer,
        plan.documents,
        plan.settings.buckets,
        micro_batch_size=micro_batch_size,
        on_scored=on_scored,
    )
    return LossReport(plan.settings, loss)


def write_loss_files(
    report: LossReport,
    output: Path,
    plot: Path | None,
    *,
    baseline: PositionLoss | None = None,
    title: str = "Loss by position in the document",
) -> list[Path]:
    """Write the report and, where asked, the curves; gives where."""
    write_loss_report(output, report)
    if plot is None:
        return [output]
    length = report.settings.training_length
    plot_position_curves(plot, report.loss, baseline, title=title, training_length=length)
    return [output, plot]
