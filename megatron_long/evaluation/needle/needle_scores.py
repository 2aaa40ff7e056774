"""From needle cases to results: one forward pass a batch of cells, and free generation where asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_long.errors import ConfigError, DataError
from megatron_long.evaluation.batches import RowScores, TokenScorer, score_rows
from megatron_long.evaluation.needle.cases import NeedleCase

if TYPE_CHECKING:
    from megatron_long.tokenizer.tokenizer_types import Tokenizer

MAX_NEW_TOKENS = 50
"""Tokens generated for an answer, as in the authors' code."""


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
    task: str = "sentence"
    seed: int = 0
    generated: str | None = None
    """What the model wrote after the question, without the lead; None without generation."""
    rouge1: float | None = None
    """ROUGE-1 F-measure of `generated` against the hidden sentence; the authors write ten times it."""
    answer_words: float | None = None
    """Share of the answer's distinct words that `generated` holds: the score of the paper's figure."""

    @property
    def key(self) -> tuple[str, int, int, float]:
        """What tells this cell from the others, as `NeedleCase.key`."""
        return self.task, self.seed, self.context_length, self.depth


class Generator(Protocol):
    """A model that can write on."""

    def generate(self, tokens: np.ndarray, max_new_tokens: int) -> np.ndarray:
        """Give the tokens that greedy decoding adds."""
        ...


class Deadline:
    """Stops a run between rounds, before the next one would end too late.

    Args:
        seconds: From `start` on; None never stops.
        start: `time.monotonic()` of the start of the command; None is now.
    """

    def __init__(self, seconds: float | None, start: float | None = None) -> None:
        self.last = time.monotonic()
        self.start = self.last if start is None else start
        self.seconds = seconds
        self.is_over = False

    @classmethod
    def of_minutes(cls, minutes: float | None, start: float) -> Deadline:
        """Give that of `--stop-after-minutes`."""
        return cls(None if minutes is None else 60 * minutes, start)

    def may_go_on(self, scorer: TokenScorer) -> bool:
        """Whether another round fits, if it takes as long as the last one (rounds get shorter).

        Every process of the job is told the same.
        """
        now = time.monotonic()
        if self.seconds is not None:
            is_late = now + (now - self.last) > self.start + self.seconds
            self.is_over = bool(scorer.agree(is_late))
        self.last = now
        return not self.is_over


def score_cases(
    scorer: TokenScorer,
    cases: Sequence[NeedleCase],
    *,
    micro_batch_size: int = 1,
    on_round: Callable[[list[NeedleResult]], object] = lambda results: None,
    deadline: Deadline | None = None,
    answer_freely: Callable[[NeedleCase, NeedleResult], NeedleResult] | None = None,
) -> list[NeedleResult]:
    """Score cases, split over the data-parallel ranks; every rank gets all results.

    Args:
        micro_batch_size: Cases of the full context length that share a batch; shorter ones share it
            in greater number.
        on_round: Told the new results of all replicas after each round of batches, on every rank.
        deadline: Ends the run early.
        answer_freely: Adds what is generated to a result.
    Returns: Results in the order of the cases, without those that the deadline cut off.
    Raises: DataError: the model gives a likelihood that is not finite.
    """
    limit = deadline or Deadline(None)
    done: dict[tuple[str, int, int, float], NeedleResult] = {}
    rounds = score_rows(
        scorer,
        [case.context_length for case in cases],
        lambda index: cases[index].row(),
        tokens_per_batch=micro_batch_size * scorer.context_length,
        may_go_on=lambda: limit.may_go_on(scorer),
    )
    for scores in rounds:
        mine = {cases[index].key: judge(cases[index], row) for index, row in scores.items()}
        if answer_freely is not None:
            by_key = {cases[index].key: cases[index] for index in scores}
            mine = {key: answer_freely(by_key[key], result) for key, result in mine.items()}
        fresh = {key: value for part in scorer.gather(mine) for key, value in part.items()}
        for result in fresh.values():
            _check_finite(result)
        done |= fresh
        on_round(list(fresh.values()))
    return [done[case.key] for case in cases if case.key in done]


def judge(case: NeedleCase, scores: RowScores) -> NeedleResult:
    """Give the result of a case from the scores of its row."""
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
        task=case.task,
        seed=case.seed,
    )


def free_answers(
    model: Generator, tokenizer: Tokenizer
) -> Callable[[NeedleCase, NeedleResult], NeedleResult]:
    """Give the function that lets a model write its answer and scores it as the authors do.

    Raises: ConfigError: the package `rouge-score` is missing.
    Source: evaluation code of Fu et al. 2024: ROUGE-1 with stemming against the needle, 50 new tokens;
        the figure of their paper counts distinct words of the answer.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ConfigError(
            "--backend hf scores generated answers with ROUGE, and the package rouge-score is not "
            'installed: pip install -c constraints.txt "rouge-score" (or -e ".[eval]")'
        ) from None
    rouge = RougeScorer(["rouge1"], use_stemmer=True)

    def answer(case: NeedleCase, result: NeedleResult) -> NeedleResult:
        ids = model.generate(case.prompt_tokens(), MAX_NEW_TOKENS)
        text = tokenizer.decode(ids).strip()
        hidden = " ".join(case.probe.inserts) if case.probe.is_ordered else case.probe.inserts[0]
        expected = set(case.probe.answer.lower().split())
        return replace(
            result,
            generated=text,
            rouge1=float(rouge.score(hidden, text)["rouge1"].fmeasure),
            answer_words=len(expected & set(text.lower().split())) / len(expected),
        )

    return answer


def _check_finite(result: NeedleResult) -> None:
    if not np.isfinite(result.log_likelihood):
        raise DataError(
            f"the model's loss at context length {result.context_length}, depth "
            f"{result.depth:.2f}, is {-result.log_likelihood}: the checkpoint is damaged, or "
            "its settings (--rotary-base, precision) do not fit it"
        )
