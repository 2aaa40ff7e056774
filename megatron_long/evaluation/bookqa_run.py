"""BookQA from flags to report: what is asked, the answers that are left, the file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from megatron_long.evaluation.input_checks import check_output, find_hf_folder, open_tokenizer
from megatron_long.evaluation.models import HF, ModelChoice, open_generator, warn_beyond_rope
from megatron_long.evaluation.needle.needle_scores import Deadline
from megatron_long.evaluation.progress_log import append_records, start_log
from megatron_long.files import atomic_path

if TYPE_CHECKING:
    from megatron_long.tokenizer.tokenizer_types import Tokenizer

ANSWERS, REPORT = "answers.jsonl", "bookqa.json"


@dataclass(frozen=True)
class BookPlan:
    """All that is known before the model is loaded."""

    choice: ModelChoice
    tokenizer: Tokenizer
    questions: list[BookQuestion]
    context_length: int
    """Tokens of prompt and answer."""
    settings: dict[str, Any]
    """What decides the answers, for the report and for the next run of the same command."""


def prepare_books(args: argparse.Namespace) -> BookPlan:
    """Check everything that can be wrong with a command, and give what is to be asked.

    Args:
        args: Flags of `evaluate_bookqa.py`.
    Raises: ConfigError, DataError: see what is called.
    """
    if args.context_length <= 2 * MAX_NEW_TOKENS:
        raise ConfigError(
            f"--context-length {args.context_length} leaves no room for a book next to an answer of "
            f"{MAX_NEW_TOKENS} tokens; give more than {2 * MAX_NEW_TOKENS}"
        )
    folder = find_hf_folder(args.checkpoint)
    choice = ModelChoice(folder, HF, False, None, precision=args.precision)
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
    return BookPlan(choice, tokenizer, questions, args.context_length, settings)


def answer_left(
    plan: BookPlan,
    known: Sequence[BookAnswer],
    log: Path,
    *,
    stop_after_minutes: float | None,
    program_start: float,
) -> list[BookAnswer]:
    """Answer what is left, a question a process at a time; the model is loaded if anything is.

    Args:
        known: Answers of an earlier run of the same command.
        log: File of the answers, from which the same command resumes.
        stop_after_minutes: Ends the run early; counted from `program_start`, of `time.monotonic()`.
    Returns: All answers, in the order of the questions.
    Raises: UserError: the log cannot be written.
    """
    by_number = {answer.number: answer for answer in known}
    left = [question for question in plan.questions if question.number not in by_number]
    done = [by_number[item.number] for item in plan.questions if item.number in by_number]
    if not left:
        return done
    model = open_generator(plan.choice, context_length=plan.context_length)
    if model.is_writer:
        start_log(log, plan.settings, [asdict(answer) for answer in done])
    deadline = Deadline.of_minutes(stop_after_minutes, program_start)
    for start in range(0, len(left), model.data_parallel_size):
        if not deadline.may_go_on(model):
            break
        mine = left[start : start + model.data_parallel_size][model.data_parallel_rank :][:1]
        fresh = [answer_question(model, plan.tokenizer, x, plan.context_length) for x in mine]
        gathered = [answer for part in model.gather(fresh) for answer in part]
        done += gathered
        if model.is_writer:
            append_records(log, [asdict(answer) for answer in gathered])
    model.close()
    return sorted(done, key=lambda answer: answer.number)


def write_book_report(
    path: Path, plan: BookPlan, answers: Sequence[BookAnswer]
) -> dict[str, float]:
    """Write the report as JSON, whole or not at all; gives the means, in percent."""
    means = summarize_answers(answers)
    content = {
        "kind": "bookqa",
        "settings": plan.settings,
        "is_complete": len(answers) == len(plan.questions),
        "means_percent": means,
        "answers": [asdict(answer) for answer in answers],
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return means
