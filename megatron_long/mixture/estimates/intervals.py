"""Confidence intervals of estimates from a sample, for totals and shares that may be near zero.

Both are score intervals, with the variance of the estimate expressed as the number of equal, independent
observations that would give it ("effective sample size"). They are longer on the side where the truth
may be far off, never go below zero or above one, and tend to the normal interval for large samples. The
variance is itself an estimate: Student's t has the degrees of freedom of the design, and at most as many as
there are effective observations of what is counted (a few large documents tell little of how they vary).
"""

import math
from dataclasses import dataclass

Z = 1.959964
"""Quantile of the normal distribution for intervals of 95%."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval that holds the truth in 95 of 100 samples."""

    value: float
    low: float
    high: float

    @property
    def is_exact(self) -> bool:
        """Return whether there is no error."""
        return self.low == self.high

    def scaled(self, factor: float) -> "Interval":
        """Return the interval of a multiple."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)

    def plus(self, other: "Interval") -> "Interval":
        """Return the interval of a sum whose errors go together."""
        return Interval(self.value + other.value, self.low + other.low, self.high + other.high)


def exact(value: float) -> Interval:
    """Return the interval of a known number."""
    return Interval(value, value, value)


def t_quantile(degrees: float) -> float:
    """Return the 97.5% quantile of Student's distribution.

    Source: Abramowitz and Stegun 1964, 26.7.5.

    >>> round(t_quantile(10), 2), round(t_quantile(1e9), 2)
    (2.23, 1.96)
    """
    n = max(degrees, 2.0)
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
    )
    return Z + sum(term / n ** (power + 1) for power, term in enumerate(terms))


def total_interval(value: float, variance: float, degrees: float = math.inf) -> Interval:
    """Return the score interval of a positive total, as of a Poisson count with the same relative error.

    Source: the score interval of a Poisson mean (Barker 2002, "A comparison of nine confidence intervals
    for a Poisson parameter"), with the effective count value^2 / variance.

    >>> total_interval(100.0, 100.0)
    Interval(value=100.0, low=82.03..., high=121.90...)
    """
    if variance <= 0 or value <= 0:
        return exact(value)
    count = value**2 / variance
    t = t_quantile(min(degrees, count))
    middle, half = count + t**2 / 2, t * math.sqrt(count + t**2 / 4)
    return Interval(value, value * max(middle - half, 0.0) / count, value * (middle + half) / count)


def share_interval(
    share: float, variance: float, degrees: float = math.inf, observations: float = math.inf
) -> Interval:
    """Return Wilson's interval of a share, with the effective sample size share (1 - share) / variance.

    Args:
        observations: Most that the effective size can be. It tells what a share of zero or one leaves open.
    Source: Wilson 1927; for samples of clusters, Dean and Pagano 2015, "Evaluating confidence interval
    methods for binomial proportions in clustered surveys".

    >>> share_interval(0.5, 0.0025), share_interval(0.0, 0.0, observations=100)
    (Interval(value=0.5, low=0.402..., high=0.597...), Interval(value=0.0, low=0.0, high=0.036...))
    """
    spread = share * (1 - share)
    size = min(spread / variance if variance > 0 and spread > 0 else math.inf, observations)
    if math.isinf(size):
        return exact(share)
    size = max(size, 1e-9)
    rarer = min(share, 1 - share) ** 2 * size / spread if spread > 0 else degrees
    t = t_quantile(min(degrees, rarer))
    middle = (share + t**2 / (2 * size)) / (1 + t**2 / size)
    half = t / (1 + t**2 / size) * math.sqrt(spread / size + t**2 / (4 * size**2))
    return Interval(share, max(min(middle - half, share), 0.0), min(max(middle + half, share), 1.0))
