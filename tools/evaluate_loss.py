"""Measure a checkpoint's loss by source and by position in the document.

Every held-out document of the dataset (`valid/<source>`) gives its first `--context-length` tokens.
The table has a row for each source and a column for each bucket of positions. Flags that are not
listed here go to Megatron, such as --tensor-model-parallel-size and --context-parallel-size.

    torchrun --nproc-per-node 4 tools/evaluate_loss.py --checkpoint CKPT --dataset DATA \\
        --context-length 131072 --output loss.json --plot loss.png --compare before.json \\
        --tensor-model-parallel-size 2 --context-parallel-size 2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_long.cli import run_tool
from megatron_long.errors import DataError
from megatron_long.evaluation.held_out import HeldOutDocument, open_held_out, select_documents
from megatron_long.evaluation.inputs import (
    check_context_length,
    check_dataset_vocabulary,
    check_output,
    find_checkpoint,
    positive_int,
)
from megatron_long.evaluation.loss_report import (
    LossReport,
    LossSettings,
    check_comparable,
    format_table,
    read_loss_report,
    write_loss_report,
)
from megatron_long.evaluation.position_loss import default_buckets, loss_by_position, parse_buckets


@dataclass(frozen=True)
class Preparation:
    """All that is known before the model is built."""

    settings: LossSettings
    documents: list[HeldOutDocument]
    before: LossReport | None


def build_parser() -> argparse.ArgumentParser:
    """Give the parser of this tool's own flags."""
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="Megatron checkpoint folder")
    add("--dataset", type=Path, required=True, help="folder written by preprocess_mix.py")
    add(
        "--context-length",
        type=positive_int,
        required=True,
        help="tokens taken of each document, a multiple of 2 * --context-parallel-size",
    )
    add("--output", type=Path, required=True, help="JSON file to write")
    add("--plot", type=Path, help="PNG file for loss against position")
    add("--compare", type=Path, help="JSON of an earlier run, for the difference (and the plot)")
    add(
        "--buckets",
        help="positions in tokens like 0-4096,4096-131072, each without its end; default: split "
        "at 4096 tokens, or at an eighth of --context-length if that is less",
    )
    add("--training-length", type=positive_int, help="old context in tokens, marked in the plot")
    add(
        "--min-document-tokens",
        type=positive_int,
        default=2,
        help="leave shorter documents out; give --context-length + 1 to have the same documents "
        "at every position (default: %(default)s)",
    )
    add("--max-documents-per-source", type=positive_int, help="take only the first so many")
    add("--tokenizer", type=Path, help="check that the dataset was made with this tokenizer")
    add("--micro-batch-size", type=positive_int, default=1, help="documents at a time (default: 1)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on GPUs, fp32 without")
    add("--force", action="store_true", help="replace files that exist")
    return parser


def prepare(args: argparse.Namespace, megatron_argv: Sequence[str]) -> Preparation:
    """Check everything that can be wrong and give what is to be measured."""
    from megatron_long.data.manifest import read_manifest

    for flag, path in (("--output", args.output), ("--plot", args.plot)):
        if path is not None:
            check_output(path, force=args.force, flag=flag)
    check_context_length(args.context_length, megatron_argv)
    checkpoint = find_checkpoint(args.checkpoint, megatron_argv)
    if not args.dataset.is_dir():
        raise DataError(f"--dataset {args.dataset} is not a folder; give one of preprocess_mix.py")
    manifest = read_manifest(args.dataset)
    check_dataset_vocabulary(
        manifest.tokenizer.vocab_size,
        manifest.tokenizer.vocabulary_sha256,
        args.dataset,
        args.tokenizer,
        checkpoint,
    )
    length = args.context_length
    settings = LossSettings(
        checkpoint=str(args.checkpoint),
        iteration=checkpoint.iteration,
        dataset=str(args.dataset),
        dataset_fingerprint=manifest.fingerprint,
        context_length=length,
        buckets=parse_buckets(args.buckets, length) if args.buckets else default_buckets(length),
        min_document_tokens=args.min_document_tokens,
        max_documents_per_source=args.max_documents_per_source,
        training_length=args.training_length,
        megatron_argv=tuple(megatron_argv),
    )
    before = None if args.compare is None else read_loss_report(args.compare)
    if before is not None:
        check_comparable(settings, before, args.compare)
    documents = select_documents(
        open_held_out(args.dataset, manifest),
        min_document_tokens=args.min_document_tokens,
        max_documents_per_source=args.max_documents_per_source,
    )
    return Preparation(settings, documents, before)


def publish(args: argparse.Namespace, report: LossReport, before: LossReport | None) -> None:
    """Write the files and print the table."""
    from megatron_long.evaluation.plots import plot_position_curves

    write_loss_report(args.output, report)
    if args.plot is not None:
        plot_position_curves(
            args.plot,
            report.loss,
            None if before is None else before.loss,
            training_length=args.training_length,
        )
    print(format_table(report, before))
    print("wrote", *(path for path in (args.output, args.plot) if path is not None))


def main() -> None:
    """Parse, check, score, write."""
    args, megatron_argv = build_parser().parse_known_args()
    preparation = prepare(args, megatron_argv)

    from tqdm import tqdm

    from megatron_long.evaluation.scoring import open_scorer

    scorer = open_scorer(
        args.checkpoint,
        context_length=args.context_length,
        micro_batch_size=args.micro_batch_size,
        megatron_argv=megatron_argv,
        precision=args.precision,
    )
    num_mine = len(preparation.documents[scorer.data_parallel_rank :: scorer.data_parallel_size])
    with tqdm(
        total=num_mine, unit="document", disable=not scorer.is_writer, mininterval=1.0
    ) as progress:
        loss = loss_by_position(
            scorer,
            preparation.documents,
            preparation.settings.buckets,
            micro_batch_size=args.micro_batch_size,
            on_scored=progress.update,
        )
    if scorer.is_writer:
        publish(args, LossReport(preparation.settings, loss), preparation.before)
    scorer.close()


if __name__ == "__main__":
    sys.exit(run_tool(main))
