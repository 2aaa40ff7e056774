"""Needle in a haystack: can the model repeat one sentence hidden anywhere in a long text?

A case is one sequence, scored in one forward pass:

    A long text follows, then a question about it.

    {haystack, before the needle} {needle} {haystack, after the needle}

    Question about the text above: {question}
    Answer: {lead} {answer}

where `lead` is what the needle says before the answer, so that a base model, which has learnt to
continue and not to answer, is asked for a continuation. Greedy decoding gives exactly the answer
if and only if every answer token is the most likely one given the answer before it: so no decoding
is needed, and the log-likelihood of the answer says how near a miss was.

Source: G. Kamradt, LLMTest_NeedleInAHaystack (needle and question); Fu et al. 2024,
arXiv 2402.10171, section 4 (lengths by depths grid, prompt for base models). They generate and
count words of the answer; exact match is stricter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_long.errors import ConfigError, DataError
from megatron_long.evaluation.batches import NOT_SCORED, Row, RowScores, score_rows
from megatron_long.evaluation.haystack import Haystack, encode_continuations, tokenize_haystack

if TYPE_CHECKING:
    from megatron_long.data.tokenizers import Tokenizer
    from megatron_long.evaluation.scoring import Scorer

INTRODUCTION = "A long text follows, then a question about it.\n\n"
QUESTION = "\n\nQuestion about the text above: {question}\nAnswer:"


@dataclass(frozen=True)
class NeedleTask:
    """The sentence to find and how it is asked for."""

    needle: str = (
        "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park "
        "on a sunny day."
    )
    question: str = "What is the best thing to do in San Francisco?"
    answer: str = "eat a sandwich and sit in Dolores Park on a sunny day."
    """Words of the needle that the model must give."""

    def __post_init__(self) -> None:
        for name in ("needle", "question", "answer"):
            if not getattr(self, name).strip():
                raise ConfigError(f"--{name} is empty; give at least one word")
        if self.answer not in self.needle:
            raise ConfigError(
                f"--answer {self.answer!r} is not part of --needle {self.needle!r}; the answer is "
                "words of the needle, letter by letter"
            )

    @property
    def prompt(self) -> str:
        """The question and the needle's words before the answer."""
        lead = self.needle[: self.needle.index(self.answer)].strip()
        return f"{QUESTION.format(question=self.question)} {lead}".rstrip()


@dataclass(frozen=True)
class NeedleCase:
    """One cell of the grid. Token arrays are views of the haystack, so a case is small."""

    depth: float
    """Depth asked for: share of the haystack before the needle, in [0, 1]."""
    actual_depth: float
    """Depth of the sentence boundary nearest to it."""
    needle_start: int
    """Position of the needle's first token."""
    num_answer_tokens: int
    pieces: tuple[np.ndarray, ...]
    """Token ids of the parts, in order; the last one is the answer."""

    @property
    def context_length(self) -> int:
        """Length in tokens, the answer included."""
        return sum(len(piece) for piece in self.pieces)

    def row(self) -> Row:
        """Give the tokens, labelled where the model must produce the answer."""
        tokens = np.concatenate(self.pieces)
        labels = np.full(len(tokens), NOT_SCORED, dtype=np.int64)
        answer = slice(len(tokens) - self.num_answer_tokens, None)
        labels[answer.start - 1 : -1] = tokens[answer]
        return Row(tokens, labels)


@dataclass(frozen=True)
class NeedleResult:
    """How the model did in one cell."""

    context_length: int
    depth: float
    actual_depth: float
    needle_start: int
    is_exact: bool
    """Whether greedy decoding gives the answer, token by token."""
    token_accuracy: float
    """Share of answer tokens that are the most likely one, given the answer before them."""
    log_likelihood: float
    """Mean over the answer's tokens, nats; 0 is certain."""


def build_cases(
    text: str,
    tokenizer: Tokenizer,
    task: NeedleTask,
    context_lengths: Sequence[int],
    depths: Sequence[float],
) -> list[NeedleCase]:
    """Build the grid, length by length, each case exactly as long as it says.

    The haystack is trimmed, never the question. The needle goes to the sentence boundary nearest
    to the depth, so the text around it stays whole.

    Raises: ConfigError: the haystack is too short or holds the needle already, a length leaves no
        room for the haystack, or the tokenizer cannot give the answer back.
    """
    _check_absent(text, task)
    beginning, needle, prompt, answer = _encode_parts(tokenizer, task)
    num_fixed = sum(len(part) for part in (beginning, needle, prompt, answer))
    if min(context_lengths) <= num_fixed:
        raise ConfigError(
            f"context length {min(context_lengths)} is too short: needle, question and answer "
            f"alone take {num_fixed} tokens; give --min-length or --context-lengths above {num_fixed}"
        )
    num_wanted = max(context_lengths) - num_fixed
    haystack = tokenize_haystack(text, tokenizer, num_wanted)
    if len(haystack.tokens) < num_wanted:
        raise ConfigError(
            f"--haystack has {len(haystack.tokens)} tokens, too few for context length "
            f"{max(context_lengths)}; it can do lengths up to {len(haystack.tokens) + num_fixed}: "
            "use a longer text or shorter contexts"
        )
    return [
        _build_case(haystack, (beginning, needle, prompt, answer), length - num_fixed, depth)
        for length in context_lengths
        for depth in depths
    ]


def score_cases(
    scorer: Scorer,
    cases: Sequence[NeedleCase],
    *,
    micro_batch_size: int = 1,
    on_scored: Callable[[], object] = lambda: None,
) -> list[NeedleResult]:
    """Score all cases, split over the data-parallel ranks; every rank gets all results.

    Args:
        on_scored: Called after each case of this rank, for a progress bar.
    Raises: DataError: the model gives a likelihood that is not finite.
    """
    mine = range(scorer.data_parallel_rank, len(cases), scorer.data_parallel_size)
    scored = {}
    all_scores = score_rows(
        scorer, len(mine), lambda i: cases[mine[i]].row(), micro_batch_size=micro_batch_size
    )
    for index, scores in zip(mine, all_scores, strict=True):
        scored[index] = _judge(cases[index], scores)
        on_scored()
    everything = {key: value for part in scorer.gather(scored) for key, value in part.items()}
    results = [everything[index] for index in range(len(cases))]
    _check_finite(results)
    return results


def _judge(case: NeedleCase, scores: RowScores) -> NeedleResult:
    answer = slice(-case.num_answer_tokens - 1, -1)
    is_greedy = scores.is_greedy[answer]
    return NeedleResult(
        context_length=case.context_length,
        depth=case.depth,
        actual_depth=case.actual_depth,
        needle_start=case.needle_start,
        is_exact=bool(is_greedy.all()),
        token_accuracy=float(is_greedy.mean()),
        log_likelihood=-float(scores.losses[answer].mean(dtype=np.float64)),
    )


def _encode_parts(tokenizer: Tokenizer, task: NeedleTask) -> tuple[np.ndarray, ...]:
    """Give the tokens of the beginning, the needle, the question and the answer."""
    beginning = np.asarray(tokenizer.encode(INTRODUCTION), dtype=np.int64)
    if tokenizer.bos_id is not None:
        beginning = np.concatenate([[tokenizer.bos_id], beginning])
    needle, prompt, whole = encode_continuations(
        tokenizer, [f" {task.needle}", task.prompt, f"{task.prompt} {task.answer}"]
    )
    answer = whole[len(prompt) :]
    is_continued = len(answer) > 0 and np.array_equal(whole[: len(prompt)], prompt)
    if not is_continued or tokenizer.decode(answer).strip() != task.answer.strip():
        raise ConfigError(
            f"--answer {task.answer!r} does not survive the tokenizer (it comes back as "
            f"{tokenizer.decode(answer)!r}); use an answer of plain words, apart from its lead by "
            "a space"
        )
    return beginning, needle, prompt, answer


def _build_case(
    haystack: Haystack, parts: tuple[np.ndarray, ...], num_haystack_tokens: int, depth: float
) -> NeedleCase:
    beginning, needle, prompt, answer = parts
    tokens, boundaries = haystack.window(num_haystack_tokens)
    nearest = np.argmin(np.abs(boundaries - depth * num_haystack_tokens))
    cut = int(boundaries[nearest])
    return NeedleCase(
        depth=float(depth),
        actual_depth=cut / num_haystack_tokens,
        needle_start=len(beginning) + cut,
        num_answer_tokens=len(answer),
        pieces=(beginning, tokens[:cut], needle, tokens[cut:], prompt, answer),
    )


def _check_absent(text: str, task: NeedleTask) -> None:
    plain = " ".join(text.split())
    for flag, words in (("--needle", task.needle), ("--answer", task.answer)):
        if " ".join(words.split()) in plain:
            raise ConfigError(
                f"--haystack already contains {flag} {words!r}, so the test would prove nothing; "
                "use another text or another needle"
            )


def _check_finite(results: Sequence[NeedleResult]) -> None:
    for result in results:
        if not np.isfinite(result.log_likelihood):
            raise DataError(
                f"the model's loss at context length {result.context_length}, depth "
                f"{result.depth:.2f}, is {-result.log_likelihood}: the checkpoint is damaged, or "
                "its settings (--rotary-base, precision) do not fit it"
            )
