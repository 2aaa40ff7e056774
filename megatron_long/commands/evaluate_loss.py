"""Measure a checkpoint's loss by source and by position in the document.

Every held-out document of the dataset (`valid/<source>`) gives its first `--context-length` tokens.
The table has a row for each source and a column for each bucket of positions. Flags that are not
listed here go to Megatron, such as --tensor-model-parallel-size and --context-parallel-size.

    torchrun --nproc-per-node 4 tools/evaluate_loss.py --checkpoint CKPT --dataset DATA \\
        --context-length 131072 --output loss.json --plot loss.png --compare before.json \\
        --tensor-model-parallel-size 2 --context-parallel-size 2

With --text instead of --dataset, long texts are cut into rows of --context-length tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_long.cli import length_tokens, tool_parser
from megatron_long.evaluation.input_checks import positive_int
from megatron_long.evaluation.loss.loss_report import LossReport, format_table
from megatron_long.evaluation.loss.loss_run import prepare_loss, run_loss, write_loss_files
from megatron_long.evaluation.loss.loss_table import (
    build_table,
    format_loss_table,
    write_loss_table,
)
from megatron_long.evaluation.models import add_model_flags, open_model


def build_parser() -> argparse.ArgumentParser:
    """Give the parser of this tool's own flags."""
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add_model_flags(parser)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--dataset", type=Path, help="folder written by preprocess_mix.py")
    data.add_argument(
        "--text", type=Path, nargs="+", help="instead: long text files, UTF-8; each is a source"
    )
    add(
        "--context-length",
        type=length_tokens,
        required=True,
        help="tokens taken of each document, a multiple of 2 * --context-parallel-size if that is not 1",
    )
    add("--output", type=Path, required=True, help="JSON file to write")
    add("--plot", type=Path, help="PNG file for loss against position")
    add(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        help="JSON of earlier runs, the baseline first: differences to it as the paper's table 5, "
        "printed and next to --output as -table.csv and -table.png",
    )
    add("--name", default="this model", help="its name in the table (default: %(default)s)")
    add(
        "--buckets",
        help="positions in tokens like 0-4096,4096-131072, each without its end; default: split "
        "at 4096 tokens, or at an eighth of --context-length if that is less",
    )
    add("--training-length", type=length_tokens, help="old context in tokens, marked in the plot")
    _add_document_flags(parser)
    add("--force", action="store_true", help="replace files that exist")
    return parser


def _add_document_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--min-document-tokens",
        type=length_tokens,
        default=2,
        help="leave shorter documents out; give --context-length + 1 to have the same documents "
        "at every position (default: %(default)s)",
    )
    add("--max-documents-per-source", type=positive_int, help="take only the first so many")


def main() -> None:
    """Parse, check, score, write."""
    args, megatron_argv = build_parser().parse_known_args()
    choice, plan, earlier = prepare_loss(args, megatron_argv)

    from tqdm import tqdm

    scorer = open_model(choice, context_length=args.context_length)
    with tqdm(
        total=-(-len(plan.documents) // scorer.data_parallel_size),
        unit="document",
        disable=not scorer.is_writer,
        mininterval=1.0,
    ) as progress:
        report = run_loss(
            plan, scorer, micro_batch_size=args.micro_batch_size, on_scored=progress.update
        )
    if scorer.is_writer:
        publish(args, report, earlier)
    scorer.close()


def publish(
    args: argparse.Namespace, report: LossReport, earlier: list[tuple[str, LossReport]]
) -> None:
    """Write the files and print the tables."""
    baseline = earlier[0][1].loss if earlier else None
    written = write_loss_files(report, args.output, args.plot, baseline=baseline)
    print(format_table(report))
    if earlier:
        table = build_table([*earlier, (args.name, report)])
        print(f"\n{format_loss_table(table)}")
        written += write_loss_table(args.output, table)
    print("wrote", *written)
