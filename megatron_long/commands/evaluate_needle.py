"""Needle-in-a-haystack heatmap of a checkpoint: context length by depth of the needle.

The haystack is any long text file; the needle goes between two of its sentences. Each case is one
row of a forward pass: greedy decoding gives the answer exactly if every answer token is the most
likely one. Short cases share a pass. Cells that are done are kept: the same command resumes where
it was stopped. Flags that are not listed here go to Megatron, such as --context-parallel-size.

    torchrun --nproc-per-node 4 tools/evaluate_needle.py --checkpoint CKPT --haystack book.txt \\
        --context-length 131072 --training-length 81920 --output-dir needle \\
        --context-parallel-size 4
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron_long.cli import length_tokens, tool_parser
from megatron_long.evaluation.input_checks import positive_int
from megatron_long.evaluation.models import (
    ModelChoice,
    add_model_flags,
    check_megatron_flags,
    open_model,
)
from megatron_long.evaluation.needle.cases import PROMPTS
from megatron_long.evaluation.needle.needle_report import NeedleReport, format_summary
from megatron_long.evaluation.needle.needle_run import (
    CELLS,
    HEATMAP,
    REPORT,
    NeedlePlan,
    describe_left,
    prepare_needles,
    resumed,
    run_needles,
    write_needle_files,
)
from megatron_long.evaluation.needle.needle_scores import Deadline
from megatron_long.evaluation.needle.needle_tasks import SENTENCE, TASK_NAMES, NeedleTask
from megatron_long.evaluation.progress_log import writing
from megatron_long.job.rendezvous import is_first_process

PROGRAM_START = time.monotonic()


def build_parser() -> argparse.ArgumentParser:
    """Give the parser of this tool's own flags."""
    parser = tool_parser(__doc__)
    add_model_flags(parser)
    _add_grid_flags(parser)
    _add_task_flags(parser)
    add = parser.add_argument
    add("--output-dir", type=Path, required=True, help=f"folder for {CELLS}, {REPORT}, {HEATMAP}")
    add("--training-length", type=length_tokens, help="context trained at, in tokens: split there")
    add("--stop-after-minutes", type=float, help="stop in time; the same command resumes later")
    add("--dry-run", action="store_true", help="check, say how much work it is, and end")
    add("--force", action="store_true", help="forget the cells that are done")
    return parser


def _add_grid_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--haystack", type=Path, required=True, help="long text file, UTF-8")
    add(
        "--context-length",
        type=length_tokens,
        help="longest case in tokens, a multiple of 2 * --context-parallel-size where that is above 1",
    )
    add(
        "--min-length",
        type=length_tokens,
        help="shortest case in tokens (default: 1024, or an eighth of --context-length if less)",
    )
    add("--num-lengths", type=positive_int, default=40, help="lengths (default: %(default)s)")
    add("--context-lengths", type=length_tokens, nargs="+", help="these lengths in tokens instead")
    add("--num-depths", type=positive_int, default=10, help="depths from 0 to 100%% (default: 10)")
    add("--num-seeds", type=positive_int, default=1, help="repetitions of each cell (default: 1)")


def _add_task_flags(parser: argparse.ArgumentParser) -> None:
    add, task = parser.add_argument, NeedleTask()
    add(
        "--tasks",
        nargs="+",
        choices=TASK_NAMES,
        default=[SENTENCE],
        help="what to hide: the sentence of --needle, or names and numbers drawn for each case",
    )
    add("--needle", default=task.needle, help="sentence to hide (default: %(default)s)")
    add("--question", default=task.question, help="how it is asked for (default: %(default)s)")
    add("--answer", default=task.answer, help="words of the needle to give (default: %(default)s)")
    add("--needles", type=Path, help="JSON list of {needle, question, answer}, instead of one")
    add("--prompt", choices=tuple(PROMPTS), default="paper", help="(default: %(default)s)")


def main() -> None:
    """Parse, check, score, write."""
    args, megatron_argv = build_parser().parse_known_args()
    choice, plan = prepare_needles(args, megatron_argv)
    with resumed(plan, args.output_dir, force=args.force, reads_only=args.dry_run) as rest:
        measure(args, choice, rest)


def measure(args: argparse.Namespace, choice: ModelChoice, plan: NeedlePlan) -> None:
    """Do what is left, or with `--dry-run` say what it is."""
    if args.dry_run:
        check_megatron_flags(choice, context_length=plan.context_length)
    if is_first_process():
        print(describe_left(plan, choice.geometry(), args.micro_batch_size), flush=True)
    if args.dry_run:
        return
    if plan.cases_left:
        score(args, choice, plan)
    elif is_first_process():
        publish(args.output_dir, plan.report(plan.done))


def score(args: argparse.Namespace, choice: ModelChoice, plan: NeedlePlan) -> None:
    """Load the model, score what is left and write."""
    from tqdm import tqdm

    scorer = open_model(choice, context_length=plan.context_length)
    is_writer, left = scorer.is_writer, len(plan.cases_left)
    with tqdm(total=left, unit="case", disable=not is_writer, mininterval=1) as progress:
        report = run_needles(
            plan,
            scorer,
            micro_batch_size=args.micro_batch_size,
            folder=args.output_dir,
            deadline=Deadline.of_minutes(args.stop_after_minutes, PROGRAM_START),
            on_scored=progress.update,
        )
    if is_writer and report.results:
        publish(args.output_dir, report)
    scorer.close()
    num_left = len(plan.cases) - len(report.results)
    if is_writer and num_left:
        print(f"stopped in time with {num_left} cells left; the same command resumes")


def publish(folder: Path, report: NeedleReport) -> None:
    """Write the files and print the means."""
    with writing(folder / REPORT):
        written = write_needle_files(folder, report)
    print(format_summary(report))
    print("wrote", *written)
