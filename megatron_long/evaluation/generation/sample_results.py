"""One row a sample, of any task that is answered by generation, and what rows add up to.

Rows are kept as they are (`samples.jsonl`), so that each figure can be traced to prompts and answers. Errors
are 95% intervals by bootstrap over samples, each task's for itself. Samples get random weights, as in Rubin's
Bayesian bootstrap, with half a sample of 0 and of 100 added: for scores of 0 or 100 that is Jeffreys'
interval, so that 100 right answers of 100 do not count as certainty.

Source: Rubin 1981, "The Bayesian bootstrap"; Brown, Cai and DasGupta 2001, "Interval estimation for a
binomial proportion", on Jeffreys' interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 4000
INTERVAL_PERCENT = (2.5, 97.5)


@dataclass(frozen=True)
class SampleResult:
    """What a model said to one prompt."""

    task: str
    context_length: int
    """Tokens that prompt and answer may take together."""
    index: int
    """Number of the sample within its task and length, from 0."""
    prompt_sha256: str
    """Of the prompt's text in UTF-8."""
    prompt_tokens: int
    """Tokens that the model was given, BOS included."""
    answers: list
    """What is looked for in the prediction."""
    prediction: str
    score: float | None
    """Percent; None where it would say nothing of the model, see `problem`."""
    problem: str = ""

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells it from the others of a run."""
        return self.task, self.context_length, self.index


@dataclass(frozen=True)
class Estimate:
    """A mean over samples."""

    mean: float | None
    """Percent; None if nothing is scored."""
    low: float | None = None
    high: float | None = None
    """Ends of the 95% interval."""
    num_samples: int = 0
    num_unscored: int = 0
    num_empty: int = 0
    """Answers without a character."""

    def __str__(self) -> str:
        if self.mean is None:
            return "-"
        return f"{self.mean:.1f} ({self.low:.1f}-{self.high:.1f})"


def estimate_task(results: Sequence[SampleResult]) -> Estimate:
    """Give the mean of one task and length.

    Where every answer is empty the model was asked in a way that it does not know (a wrong chat template
    ends the text for it), so there is no mean.

    >>> row = SampleResult("vt", 4096, 0, "", 9, ["A"], "A", 100.0)
    >>> print(estimate_task([row] * 100), estimate_task([]))
    100.0 (97.6-100.0) -
    """
    scores = np.array([item.score for item in results if item.score is not None])
    num_empty = sum(not item.prediction for item in results if item.score is not None)
    counts = {
        "num_samples": len(results),
        "num_unscored": len(results) - len(scores),
        "num_empty": num_empty,
    }
    if num_empty == len(scores):
        return Estimate(None, **counts)
    drawn = _resampled_means(scores, np.random.default_rng(0))
    return Estimate(float(scores.mean()), *_interval(drawn, scores.mean()), **counts)


def estimate_average(tasks: Sequence[Sequence[SampleResult]]) -> Estimate:
    """Give the mean over tasks of their means, each task counting the same; None if one has none."""
    parts = [estimate_task(results) for results in tasks]
    counts = {
        "num_samples": sum(part.num_samples for part in parts),
        "num_unscored": sum(part.num_unscored for part in parts),
        "num_empty": sum(part.num_empty for part in parts),
    }
    means = [part.mean for part in parts if part.mean is not None]
    if not parts or len(means) < len(parts):
        return Estimate(None, **counts)
    generator = np.random.default_rng(0)  # one for all: tasks are drawn independently
    drawn = [
        _resampled_means(np.array([r.score for r in rows if r.score is not None]), generator)
        for rows in tasks
    ]
    mean = float(np.mean(means))
    return Estimate(mean, *_interval(np.mean(drawn, axis=0), mean), **counts)


def _resampled_means(scores: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means of `scores` with random weights, half a sample at each end of the scale added."""
    values = np.append(scores, [0.0, 100.0])
    shapes = np.append(np.ones(len(scores)), [0.5, 0.5])
    weights = generator.standard_gamma(shapes, (NUM_RESAMPLES, len(values)))
    return weights @ values / weights.sum(axis=1)


def _interval(drawn: np.ndarray, mean: float) -> tuple[float, float]:
    low, high = np.percentile(drawn, INTERVAL_PERCENT)
    return float(min(low, mean)), float(max(high, mean))
