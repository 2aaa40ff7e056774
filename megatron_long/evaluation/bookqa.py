"""BookQA: questions about whole novels, answered by generation, scored by F1 as InfiniteBench does.

The file is InfiniteBench's `longbook_qa_eng.jsonl`: one object a line with `context` (the book), `input` (the
question) and `answer` (those accepted). A prompt beyond the context loses tokens from its middle.

Source: InfiniteBench (Zhang et al. 2024, arXiv 2402.13718), data format, F1 and the cut in the middle; the
prompt for base models is that of Fu et al. 2024's evaluation code, as is the recall of answer words.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_long.errors import ConfigError, DataError
from megatron_long.evaluation.needle.needle_scores import Generator

if TYPE_CHECKING:
    from megatron_long.tokenizer.tokenizer_types import Tokenizer

PROMPT = (
    "<|im_start|>Read the book below and answer a question.\n\n{context}\n\n"
    "Question: {question}\n\nAnswer:"
)
MAX_NEW_TOKENS = 40
ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class BookQuestion:
    """One line of the file."""

    number: int
    """Its line, from 0."""
    book: str
    question: str
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The whole prompt, not yet cut."""
        return PROMPT.format(context=self.book, question=self.question)


@dataclass(frozen=True)
class BookAnswer:
    """What the model said to one question."""

    number: int
    prompt_tokens: int
    """Tokens of the prompt as it was given."""
    is_cut: bool
    """Whether the book's middle was left out."""
    prediction: str
    f1: float
    """Best over the accepted answers, in [0, 1]."""
    recall: float
    """Share of the first answer's distinct words in the prediction."""


def read_questions(path: Path) -> Iterator[BookQuestion]:
    """Read the questions, one at a time: the file has hundreds of MB.

    Raises: ConfigError: no such file. DataError: a line that is no such object.
    """
    if not path.is_file():
        raise ConfigError(
            f"--data {path} is not a file; give longbook_qa_eng.jsonl of InfiniteBench"
        )
    with path.open("rb") as file:
        for number, line in enumerate(file):
            try:
                item = json.loads(line.decode("utf-8"))
                answers = _read_answers(item["answer"])
                question = BookQuestion(number, str(item["context"]), str(item["input"]), answers)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DataError(
                    f"{path}:{number + 1} is no question ({error!r}); a line is an object with "
                    "context, input and answer"
                ) from error
            yield question


def _read_answers(value: object) -> tuple[str, ...]:
    """Give the accepted answers; `ValueError` says that they are none."""
    answers = [value] if isinstance(value, str) else value
    items = answers if isinstance(answers, list) else []
    if not items or not all(isinstance(answer, str) and answer.strip() for answer in items):
        raise ValueError(f"answer is {json.dumps(value)[:60]}, not words or a list of words")
    return tuple(items)


def cut_middle(tokens: np.ndarray, longest: int) -> np.ndarray:
    """Leave out the middle of what is too long.

    >>> cut_middle(np.arange(9), 4).tolist()
    [0, 1, 7, 8]
    """
    if len(tokens) <= longest:
        return tokens
    half = longest // 2
    return np.concatenate([tokens[:half], tokens[len(tokens) - (longest - half) :]])


def normalize_answer(text: str) -> str:
    """Lower the case; drop punctuation, articles and extra space.

    >>> normalize_answer("The  cat's Hat.")
    'cats hat'
    """
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", plain).split())


def f1_score(prediction: str, answer: str) -> float:
    """Give the F1 of the normalized words.

    >>> f1_score("the red house", "A red barn")
    0.5
    """
    said, wanted = normalize_answer(prediction).split(), normalize_answer(answer).split()
    num_same = sum((Counter(said) & Counter(wanted)).values())
    return 2 * num_same / (len(said) + len(wanted)) if num_same else 0.0


def answer_question(
    model: Generator, tokenizer: Tokenizer, question: BookQuestion, context_length: int
) -> BookAnswer:
    """Let a model answer one question.

    Args:
        context_length: Tokens of prompt and answer together.
    """
    tokens = np.asarray(tokenizer.encode(question.prompt), dtype=np.int64)
    if tokenizer.bos_id is not None:
        tokens = np.concatenate([[tokenizer.bos_id], tokens])
    prompt = cut_middle(tokens, context_length - MAX_NEW_TOKENS)
    prediction = tokenizer.decode(model.generate(prompt, MAX_NEW_TOKENS)).strip()
    wanted = set(question.answers[0].lower().split())
    return BookAnswer(
        number=question.number,
        prompt_tokens=len(prompt),
        is_cut=len(prompt) < len(tokens),
        prediction=prediction,
        f1=max(f1_score(prediction, answer) for answer in question.answers),
        recall=len(wanted & set(prediction.lower().split())) / len(wanted),
    )


def summarize_answers(answers: Sequence[BookAnswer]) -> dict[str, float]:
    """Give the means, in percent as they are usually told."""
    mean: Callable[[str], float] = lambda name: float(  # noqa: E731
        100 * np.mean([getattr(answer, name) for answer in answers])
    )
    return {
        "num_questions": len(answers),
        "f1": mean("f1"),
        "recall": mean("recall"),
        "cut": mean("is_cut"),
    }
