"""Needle-in-a-haystack heatmap of a checkpoint: context length by depth of the needle.

The haystack is any long text file; the needle goes between two of its sentences. Each case is one
forward pass: greedy decoding gives the answer exactly if every answer token is the most likely one.
Flags that are not listed here go to Megatron, such as --context-parallel-size.

    torchrun --nproc-per-node 4 tools/evaluate_needle.py --checkpoint CKPT --haystack book.txt \\
        --context-length 131072 --training-length 81920 --output-dir needle \\
        --context-parallel-size 4
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_long.cli import run_tool
from megatron_long.errors import ConfigError
from megatron_long.evaluation.haystack import read_haystack
from megatron_long.evaluation.inputs import (
    check_context_length,
    check_output,
    find_checkpoint,
    open_tokenizer,
    positive_int,
)
from megatron_long.evaluation.needle import (
    NeedleCase,
    NeedleResult,
    NeedleTask,
    build_cases,
    score_cases,
)
from megatron_long.evaluation.needle_report import (
    NeedleReport,
    NeedleSettings,
    format_summary,
    spread_depths,
    spread_lengths,
    write_needle_report,
)

REPORT, HEATMAP = "needle.json", "needle.png"


@dataclass(frozen=True)
class Preparation:
    """All that is known before the model is built."""

    settings: NeedleSettings
    context_length: int
    cases: list[NeedleCase]


def build_parser() -> argparse.ArgumentParser:
    """Give the parser of this tool's own flags."""
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, task = parser.add_argument, NeedleTask()
    add("--checkpoint", type=Path, required=True, help="Megatron checkpoint folder")
    add("--haystack", type=Path, required=True, help="long text file, UTF-8")
    add("--output-dir", type=Path, required=True, help=f"folder for {REPORT} and {HEATMAP}")
    add(
        "--context-length",
        type=positive_int,
        help="longest case in tokens, a multiple of 2 * --context-parallel-size",
    )
    add(
        "--min-length",
        type=positive_int,
        help="shortest case in tokens (default: 1024, or an eighth of --context-length if less)",
    )
    add("--num-lengths", type=positive_int, default=40, help="lengths (default: %(default)s)")
    add("--context-lengths", type=positive_int, nargs="+", help="these lengths in tokens instead")
    add("--num-depths", type=positive_int, default=10, help="depths from 0 to 100%% (default: 10)")
    add("--training-length", type=positive_int, help="context trained at, in tokens: split there")
    add("--tokenizer", type=Path, help="file or folder (default: the checkpoint's tokenizer/)")
    add("--needle", default=task.needle, help="sentence to hide (default: %(default)s)")
    add("--question", default=task.question, help="how it is asked for (default: %(default)s)")
    add("--answer", default=task.answer, help="words of the needle to give (default: %(default)s)")
    add("--micro-batch-size", type=positive_int, default=1, help="cases at a time (default: 1)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on GPUs, fp32 without")
    add("--force", action="store_true", help="replace files that exist")
    return parser


def choose_lengths(args: argparse.Namespace) -> tuple[int, ...]:
    """Give the context lengths of the grid, in tokens.

    Raises: ConfigError: none given, or out of range.
    """
    if args.context_lengths is None and args.context_length is None:
        raise ConfigError("neither --context-length nor --context-lengths is given; give one")
    if args.context_lengths is None:
        return spread_lengths(args.min_length, args.context_length, args.num_lengths)
    longest = max(args.context_lengths)
    if args.context_length is not None and longest > args.context_length:
        raise ConfigError(
            f"--context-lengths {longest} is above --context-length {args.context_length}; "
            "leave out one of them"
        )
    return tuple(sorted(set(args.context_lengths)))


def prepare(args: argparse.Namespace, megatron_argv: Sequence[str]) -> Preparation:
    """Check everything that can be wrong and give what is to be measured."""
    for name in (REPORT, HEATMAP):
        check_output(args.output_dir / name, force=args.force, flag="--output-dir")
    lengths = choose_lengths(args)
    context_length = args.context_length or max(lengths)
    check_context_length(context_length, megatron_argv)
    checkpoint = find_checkpoint(args.checkpoint, megatron_argv)
    task = NeedleTask(args.needle, args.question, args.answer)
    text = read_haystack(args.haystack)
    tokenizer = open_tokenizer(args.tokenizer, checkpoint)
    depths = spread_depths(args.num_depths)
    settings = NeedleSettings(
        checkpoint=str(args.checkpoint),
        iteration=checkpoint.iteration,
        haystack=str(args.haystack),
        vocabulary_sha256=tokenizer.vocabulary_sha256,
        task=task,
        context_lengths=lengths,
        depths=depths,
        training_length=args.training_length,
        megatron_argv=tuple(megatron_argv),
    )
    return Preparation(
        settings, context_length, build_cases(text, tokenizer, task, lengths, depths)
    )


def publish(args: argparse.Namespace, settings: NeedleSettings, cells: list[NeedleResult]) -> None:
    """Write the files and print the means."""
    from megatron_long.evaluation.plots import plot_heatmap

    report = NeedleReport(settings, cells)
    write_needle_report(args.output_dir / REPORT, report)
    plot_heatmap(args.output_dir / HEATMAP, cells, training_length=settings.training_length)
    print(format_summary(report))
    print("wrote", args.output_dir / REPORT, args.output_dir / HEATMAP)


def main() -> None:
    """Parse, check, score, write."""
    args, megatron_argv = build_parser().parse_known_args()
    preparation = prepare(args, megatron_argv)

    from tqdm import tqdm

    from megatron_long.evaluation.scoring import open_scorer

    scorer = open_scorer(
        args.checkpoint,
        context_length=preparation.context_length,
        micro_batch_size=args.micro_batch_size,
        megatron_argv=megatron_argv,
        precision=args.precision,
    )
    num_mine = len(preparation.cases[scorer.data_parallel_rank :: scorer.data_parallel_size])
    with tqdm(
        total=num_mine, unit="case", disable=not scorer.is_writer, mininterval=1.0
    ) as progress:
        cells = score_cases(
            scorer,
            preparation.cases,
            micro_batch_size=args.micro_batch_size,
            on_scored=progress.update,
        )
    if scorer.is_writer:
        publish(args, preparation.settings, cells)
    scorer.close()


if __name__ == "__main__":
    sys.exit(run_tool(main))
