"""RULER's 13 tasks on a checkpoint: retrieval, tracking, aggregation, questions, by context length.

Prompts are those of RULER's own generators, answers are generated greedily and scored by string match.
Rows that are done are kept: the same command resumes where it was stopped. Flags that are not listed here
go to Megatron, such as --context-parallel-size. The files that the tasks need are the user's:
docs/evaluation.md says where from.

    torchrun --nproc-per-node 4 tools/evaluate_ruler.py --checkpoint CKPT --haystack PaulGrahamEssays.json \\
        --squad dev-v2.0.json --hotpotqa hotpot_dev_distractor_v1.json --english-words english_words.json \\
        --context-lengths 4K 8K 16K 32K 64K 128K --output-dir ruler --context-parallel-size 4
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron_long.cli import length_tokens, tool_parser
from megatron_long.evaluation.generation.sample_results import SampleResult
from megatron_long.evaluation.input_checks import positive_int
from megatron_long.evaluation.models import (
    ModelChoice,
    add_model_flags,
    check_megatron_flags,
    open_row_generator,
)
from megatron_long.evaluation.needle.needle_scores import Deadline
from megatron_long.evaluation.progress_log import writing
from megatron_long.evaluation.ruler.ruler_definitions import (
    CHAT_TEMPLATES,
    DEFAULT_SEED,
    OWN_TEMPLATE,
    PUBLISHED_SAMPLES,
    RULER_TASKS,
)
from megatron_long.evaluation.ruler.ruler_report import format_report
from megatron_long.evaluation.ruler.ruler_run import (
    REPORT,
    SAMPLES,
    RulerPlan,
    answer_samples,
    prepare_ruler,
    resumed,
    write_report,
)
from megatron_long.job.rendezvous import is_first_process

PROGRAM_START = time.monotonic()


def build_parser() -> argparse.ArgumentParser:
    """Give the parser of this tool's own flags."""
    parser = tool_parser(__doc__)
    add_model_flags(parser)
    add = parser.add_argument
    add(
        "--context-lengths",
        type=length_tokens,
        nargs="+",
        required=True,
        help="tokens of prompt and answer, such as 4K 8K 16K",
    )
    add(
        "--tasks",
        nargs="+",
        choices=tuple(RULER_TASKS),
        default=list(RULER_TASKS),
        help="(default: all)",
    )
    add(
        "--num-samples",
        type=positive_int,
        default=100,
        help=f"of each task and length (default: %(default)s; published figures: {PUBLISHED_SAMPLES})",
    )
    add(
        "--haystack", type=Path, help="essays: text file, folder of *.txt, or PaulGrahamEssays.json"
    )
    add("--squad", type=Path, help="SQuAD's dev-v2.0.json, for qa_1")
    add("--hotpotqa", type=Path, help="HotpotQA's hotpot_dev_distractor_v1.json, for qa_2")
    add("--english-words", type=Path, help="RULER's english_words.json, for cwe at long lengths")
    add(
        "--template",
        choices=(*CHAT_TEMPLATES, OWN_TEMPLATE),
        default="base",
        help="chat template of RULER, or the tokenizer's own (default: %(default)s)",
    )
    add(
        "--tokens-to-generate",
        type=positive_int,
        help="at least so many, where RULER's own number is too small for this tokenizer",
    )
    add("--seed", type=int, default=DEFAULT_SEED, help="(default: %(default)s, as RULER's)")
    add("--output-dir", type=Path, required=True, help=f"folder for {SAMPLES} and {REPORT}")
    add("--stop-after-minutes", type=float, help="stop in time; the same command resumes later")
    add("--dry-run", action="store_true", help="check, say how much is left, and end")
    add("--force", action="store_true", help="forget the samples that are done")
    return parser


def main() -> None:
    """Parse, check, answer, write."""
    args, megatron_argv = build_parser().parse_known_args()
    choice, plan = prepare_ruler(args, megatron_argv)
    if args.dry_run:
        check_megatron_flags(choice, context_length=plan.context_length)
    with resumed(plan, args.output_dir, force=args.force, reads_only=args.dry_run) as rest:
        if is_first_process():
            print(
                f"{len(rest.done)} of {len(rest.done) + rest.num_left} samples are done", flush=True
            )
        if not args.dry_run:
            measure(args, choice, rest)


def measure(args: argparse.Namespace, choice: ModelChoice, plan: RulerPlan) -> None:
    """Answer what is left, and write."""
    rows = plan.done if not plan.num_left else answer(args, choice, plan)
    if is_first_process() and rows:
        with writing(args.output_dir / REPORT):
            report = write_report(args.output_dir, plan, rows)
        print(format_report(report))
        print("wrote", args.output_dir / REPORT)


def answer(args: argparse.Namespace, choice: ModelChoice, plan: RulerPlan) -> list[SampleResult]:
    """Load the model and let it answer."""
    from tqdm import tqdm

    stop_ids = {plan.tokenizer.eod_id}
    model = open_row_generator(choice, context_length=plan.context_length, stop_ids=stop_ids)
    with tqdm(total=plan.num_left, unit="sample", disable=not model.is_writer) as progress:
        rows = answer_samples(
            plan,
            model,
            args.output_dir / SAMPLES,
            micro_batch_size=args.micro_batch_size,
            deadline=Deadline.of_minutes(args.stop_after_minutes, PROGRAM_START),
            on_answered=progress.update,
        )
    model.close()
    num_left = plan.num_left + len(plan.done) - len(rows)
    if is_first_process() and num_left:
        print(f"stopped in time with {num_left} samples left; the same command resumes")
    return rows
