"""BookQA of InfiniteBench on a Hugging Face folder: questions about novels, F1 in percent.

Answers need true generation with a key-value cache, so the model is an exported one. Under torchrun every
process holds the model and they share the questions. Questions that are done are kept: the same command
resumes where it was stopped.

    torchrun --nproc-per-node 4 tools/evaluate_bookqa.py --checkpoint Llama-3-8B-128k \\
        --data longbook_qa_eng.jsonl --context-length 131072 --output-dir bookqa
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron_long.cli import length_tokens, tool_parser
from megatron_long.evaluation.bookqa import BookAnswer
from megatron_long.evaluation.bookqa_run import (
    ANSWERS,
    REPORT,
    BookPlan,
    answer_left,
    prepare_books,
    write_book_report,
)
from megatron_long.evaluation.input_checks import positive_int
from megatron_long.evaluation.progress_log import shared_log, writing
from megatron_long.job.rendezvous import is_first_process

PROGRAM_START = time.monotonic()


def build_parser() -> argparse.ArgumentParser:
    """Give the parser."""
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="Hugging Face folder")
    add("--data", type=Path, required=True, help="InfiniteBench's longbook_qa_eng.jsonl")
    add("--context-length", type=length_tokens, required=True, help="tokens of prompt and answer")
    add("--output-dir", type=Path, required=True, help=f"folder for {ANSWERS} and {REPORT}")
    add("--max-questions", type=positive_int, help="take only the first so many")
    add("--tokenizer", type=Path, help="file or folder (default: the model's own)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on GPUs, fp32 without")
    add("--stop-after-minutes", type=float, help="stop in time; the same command resumes later")
    add("--force", action="store_true", help="forget the questions that are done")
    return parser


def main() -> None:
    """Parse, check, answer, write."""
    args = build_parser().parse_args()
    plan = prepare_books(args)
    log = args.output_dir / ANSWERS
    with shared_log(log, plan.settings, BookAnswer, force=args.force) as known:
        answers = answer_left(
            plan,
            known,
            log,
            stop_after_minutes=args.stop_after_minutes,
            program_start=PROGRAM_START,
        )
        if is_first_process():
            publish(args.output_dir / REPORT, plan, answers)


def publish(path: Path, plan: BookPlan, answers: list[BookAnswer]) -> None:
    """Write the report and print the means."""
    print(f"{len(answers)} of {len(plan.questions)} questions answered")
    if not answers:
        return
    with writing(path):
        means = write_book_report(path, plan, answers)
    print(
        f"F1 {means['f1']:.2f}, recall of answer words {means['recall']:.2f} "
        f"({means['cut']:.0f}% of the books lost their middle)"
    )
    print("wrote", path)
