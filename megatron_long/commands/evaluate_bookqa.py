"""BookQA of InfiniteBench on a Hugging Face folder: questions about novels, F1 in percent.

Answers need true generation with a key-value cache, so the model is an exported one. Under torchrun every
process holds the model and they share the questions. Questions that are done are kept: the same command
goes on where it was stopped.

    torchrun --nproc-per-node 4 tools/evaluate_bookqa.py --checkpoint Llama-3-8B-128k \\
        --data longbook_qa_eng.jsonl --context-length 131072 --output-dir bookqa
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_long.cli import length_tokens, tool_parser
from megatron_long.errors import ConfigError
from megatron_long.evaluation.bookqa import (
    MAX_NEW_TOKENS,
    BookAnswer,
    BookQuestion,
    answer_question,
    read_questions,
    summarize_answers,
)
from megatron_long.evaluation.fingerprint import fingerprint, sha256_of
from megatron_long.evaluation.input_checks import (
    check_output,
    find_hf_folder,
    open_tokenizer,
    positive_int,
)
from megatron_long.evaluation.models import HF, ModelChoice, open_generator, warn_beyond_rope
from megatron_long.evaluation.needle.needle_scores import Deadline
from megatron_long.evaluation.progress_log import append_records, shared_log, start_log, writing
from megatron_long.files import atomic_path
from megatron_long.job.rendezvous import is_first_process
from megatron_long.tokenizer.tokenizer_types import Tokenizer

if TYPE_CHECKING:
    from megatron_long.evaluation.hf_scorer import HFScorer

ANSWERS, REPORT = "answers.jsonl", "bookqa.json"
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
    add("--stop-after-minutes", type=float, help="stop in time; the same command goes on later")
    add("--force", action="store_true", help="forget the questions that are done")
    return parser


def main() -> None:
    """Parse, check, answer, write."""
    args = build_parser().parse_args()
    if args.context_length <= 2 * MAX_NEW_TOKENS:
        raise ConfigError(
            f"--context-length {args.context_length} leaves no room for a book next to an answer of "
            f"{MAX_NEW_TOKENS} tokens; give more than {2 * MAX_NEW_TOKENS}"
        )
    choice = ModelChoice(find_hf_folder(args.checkpoint), HF, False, None)
    tokenizer = open_tokenizer(args.tokenizer, choice.folder)
    questions = list(islice(read_questions(args.data), args.max_questions))
    if not questions:
        raise ConfigError(f"--data {args.data} holds no question; download it again")
    settings = {
        "model": str(args.checkpoint),
        "weights_sha256": fingerprint(choice.folder),
        "vocabulary_sha256": tokenizer.vocabulary_sha256,
        "data": str(args.data),
        "data_sha256": sha256_of(args.data),
        "num_questions": len(questions),
        "context_length": args.context_length,
        "precision": args.precision,
    }
    check_output(args.output_dir / REPORT, force=True, flag="--output-dir")
    warn_beyond_rope(choice, args.context_length)
    log = args.output_dir / ANSWERS
    with shared_log(log, settings, BookAnswer, force=args.force) as records:
        known = {answer.number: answer for answer in records}
        left = [question for question in questions if question.number not in known]
        done = [known[question.number] for question in questions if question.number in known]
        if left:
            done += answer_left(args, choice, tokenizer, left, settings, done)
        if is_first_process():
            publish(args.output_dir / REPORT, settings, done, len(questions))


def answer_left(
    args: argparse.Namespace,
    choice: ModelChoice,
    tokenizer: Tokenizer,
    left: list[BookQuestion],
    settings: dict,
    done: list[BookAnswer],
) -> list[BookAnswer]:
    """Load the model and answer what is left."""
    log = args.output_dir / ANSWERS
    model = open_generator(choice, context_length=args.context_length, precision=args.precision)
    if model.is_writer:
        start_log(log, settings, [asdict(answer) for answer in done])
    answers = answer_all(args, model, tokenizer, left, log)
    model.close()
    return answers


def answer_all(
    args: argparse.Namespace,
    model: HFScorer,
    tokenizer: Tokenizer,
    left: list[BookQuestion],
    log: Path,
) -> list[BookAnswer]:
    """Answer what is left, a question a process at a time."""
    minutes = args.stop_after_minutes
    deadline = Deadline(None if minutes is None else 60 * minutes, PROGRAM_START)
    answers = []
    for start in range(0, len(left), model.data_parallel_size):
        if not deadline.may_go_on(model):
            break
        mine = left[start : start + model.data_parallel_size][model.data_parallel_rank :][:1]
        fresh = [answer_question(model, tokenizer, item, args.context_length) for item in mine]
        gathered = [answer for part in model.gather(fresh) for answer in part]
        answers += gathered
        if model.is_writer:
            append_records(log, [asdict(answer) for answer in gathered])
    return answers


def publish(path: Path, settings: dict, answers: list[BookAnswer], num_questions: int) -> None:
    """Write the report and print the means."""
    answers = sorted(answers, key=lambda answer: answer.number)
    print(f"{len(answers)} of {num_questions} questions answered")
    if not answers:
        return
    means = summarize_answers(answers)
    content = {
        "kind": "bookqa",
        "settings": settings,
        "is_complete": len(answers) == num_questions,
        "means_percent": means,
        "answers": [asdict(answer) for answer in answers],
    }
    with writing(path), atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(
        f"F1 {means['f1']:.2f}, recall of answer words {means['recall']:.2f} "
        f"({means['cut']:.0f}% of the books lost their middle)"
    )
    print("wrote", path)
