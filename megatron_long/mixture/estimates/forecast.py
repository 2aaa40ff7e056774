"""What a mixture makes of an estimated corpus: the tokens and the share of long ones of each source.

Nothing is planned with a part of the documents and a part of the budget, which would cut documents and
change their lengths: the figures are expected values. Their intervals hold the error of the estimate and
the spread of the documents that the keys happen to choose.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_long.mixture.corpus_stats import SourceStats
from megatron_long.mixture.estimates.block_estimates import CorpusEstimate, SourceEstimate
from megatron_long.mixture.estimates.intervals import Interval, Z, exact
from megatron_long.mixture.mixture import Mixture, source_shares
from megatron_long.mixture.selection import VALID_MAX_SHARE
from megatron_long.mixture.shares import NATURAL_ERROR, keep_ratio


@dataclass(frozen=True)
class SourceForecast:
    """One source, before and after."""

    corpus: SourceEstimate
    tokens_asked: Interval
    """Of the training set."""
    tokens_usable: Interval
    """That the corpus has for it, without held-out and dropped documents, in all allowed passes."""
    long_share_after: Interval | None
    """None if it is not known: documents that are cut."""


def forecast(estimate: CorpusEstimate, mixture: Mixture) -> dict[str, SourceForecast]:
    """Return what a run would make of each source of the sample.

    Raises: ConfigError: the shares do not fit these sources.
    """
    stats = {name: stats for name, stats in estimate.stats.sources.items() if stats.tokens}
    corpus = {name: estimate.estimate(name) for name in stats}
    if mixture.rules.is_pooled:
        return _pooled(stats, corpus, mixture)
    shares = source_shares(mixture, {name: found.tokens for name, found in stats.items()})
    made = {}
    for name, found in corpus.items():
        asked = exact(shares[name] * mixture.train_tokens)
        is_estimated = mixture.is_natural and 0 < found.share.value < 1  # one source alone has all
        if is_estimated and name not in mixture.upsampled_shares:
            factor = shares[name] / found.share.value * mixture.train_tokens
            asked = _wider(found.share, NATURAL_ERROR * found.share.value).scaled(factor)
        made[name] = _one(stats[name], found, asked, mixture)
    return made


def keep_short_of(mixture: Mixture, tokens: float, long_share: float, needed: float) -> float:
    """Return the probability of keeping short documents: given, or as `selection.solve_keep_short` finds it.

    Args:
        tokens: Of the source, without those held out.
        needed: Tokens of one pass that fill the budget.
    """
    if mixture.keep_short is not None:
        return mixture.keep_short
    target = mixture.long_token_share or 0.0
    if long_share >= target or long_share <= 0:
        return 1.0
    solved = keep_ratio(long_share, target)
    fills = (needed / max(tokens, 1.0) - long_share) / (1 - long_share)
    return min(max(solved, fills), 1.0)


def _one(
    stats: SourceStats, found: SourceEstimate, asked: Interval, mixture: Mixture
) -> SourceForecast:
    plain = mixture.short_share * asked.value
    """Tokens in documents as they are; what follows is about the others, up to `long_after`."""

    def outcome(tokens: float, long_share: float) -> tuple[float, float]:
        """Return usable tokens, and the share of long ones among them."""
        left = max(tokens - _held_out(tokens, mixture) - plain, 0.0)
        needed = (asked.value - plain) / mixture.allow_repeat
        keep = keep_short_of(mixture, left, long_share, needed)
        usable = long_share + keep * (1 - long_share)
        return left * usable, long_share / usable if usable else 0.0

    tokens, long_share = found.tokens, found.long_share
    usable, after = outcome(tokens.value, long_share.value)
    corners = [
        outcome(*corner)
        for corner in itertools.product(
            (tokens.low, tokens.value, tokens.high),
            (long_share.low, long_share.value, long_share.high),
        )
    ]
    passes = mixture.allow_repeat
    supply = Interval(usable, min(c[0] for c in corners), max(c[0] for c in corners)).scaled(passes)
    range_after = Interval(after, min(c[1] for c in corners), max(c[1] for c in corners))
    keep = (
        usable / max(tokens.value - _held_out(tokens.value, mixture) - plain, 1) - long_share.value
    ) / max(1 - long_share.value, 1e-9)
    supply = _wider(supply, passes * _spread(stats, keep))
    chosen = _chosen_variance(stats, keep, after, usable, asked.value - plain)
    long_after = None if mixture.rules.cuts else _wider(range_after, Z * math.sqrt(chosen), 1.0)
    if plain and long_after:
        spread = Z * math.sqrt(_chosen_variance(stats, 1.0, long_share.value, tokens.value, plain))
        parts = _wider(long_share, spread, 1.0).scaled(mixture.short_share)
        long_after = parts.plus(long_after.scaled(1 - mixture.short_share))
    first = (min(plain, t - _held_out(t, mixture)) for t in (tokens.value, tokens.low, tokens.high))
    return SourceForecast(found, asked, supply.plus(Interval(*first)), long_after)


def _pooled(
    stats: Mapping[str, SourceStats], corpus: Mapping[str, SourceEstimate], mixture: Mixture
) -> dict[str, SourceForecast]:
    """Forecast sources that share a budget: documents of all of them fill it, in the order of their keys."""
    total = sum(found.tokens for found in stats.values())
    long_share = sum(found.long_tokens for found in stats.values()) / total
    keep = keep_short_of(mixture, total, long_share, mixture.train_tokens / mixture.allow_repeat)

    def usable(tokens: float, share: float) -> float:
        return (tokens - _held_out(tokens, mixture)) * (share + keep * (1 - share))

    lows = {name: usable(c.tokens.low, c.long_share.low) for name, c in corpus.items()}
    highs = {name: usable(c.tokens.high, c.long_share.high) for name, c in corpus.items()}
    values = {name: usable(c.tokens.value, c.long_share.value) for name, c in corpus.items()}
    whole = sum(values.values())
    left = max(whole / mixture.train_tokens - 1, 0.0)
    # Squared errors of each source's tokens: of the estimate, downwards and upwards, and of the choice.
    below = {name: (values[name] - lows[name]) ** 2 for name in values}
    above = {name: (highs[name] - values[name]) ** 2 for name in values}
    choice = {name: Z**2 * left * _squares(stats[name], keep) for name in values}
    made = {}
    for name, found in corpus.items():
        share, passes = values[name] / whole, mixture.allow_repeat
        low = _share_error(name, share, below, above, choice) / whole
        high = _share_error(name, share, above, below, choice) / whole
        asked = Interval(share, max(share - low, 0.0), min(share + high, 1.0))
        asked = asked.scaled(mixture.train_tokens)
        supply = Interval(values[name], lows[name], highs[name]).scaled(passes)
        supply = _wider(supply, passes * _spread(stats[name], keep))
        after = _after(found.long_share, keep)
        chosen = _chosen_variance(stats[name], keep, after.value, values[name], asked.value)
        after = _wider(after, Z * math.sqrt(chosen), 1.0)
        made[name] = SourceForecast(found, asked, supply, after)
    return made


def _share_error(
    name: str,
    share: float,
    own: Mapping[str, float],
    others: Mapping[str, float],
    choice: Mapping[str, float],
) -> float:
    """Return the error of the share of a source in a sum: its own and that of the others, independent."""
    rest = sum(others[other] + choice[other] for other in others if other != name)
    return math.sqrt((1 - share) ** 2 * (own[name] + choice[name]) + share**2 * rest)


def _after(long_share: Interval, keep: float) -> Interval:
    def after(share: float) -> float:
        return share / (share + keep * (1 - share)) if share else 0.0

    return Interval(after(long_share.value), after(long_share.low), after(long_share.high))


def _held_out(tokens: float, mixture: Mixture) -> float:
    return min(mixture.valid_tokens_per_source, VALID_MAX_SHARE * tokens)


def _spread(stats: SourceStats, keep: float) -> float:
    """Return the error of usable tokens because keys decide which short documents are dropped and held out.

    Held-out documents are whole: their sum is off by about the document that contains its last token.
    """
    every = sum(group.tokens_squared for group in stats.groups)
    dropped = max(keep * (1 - keep), 0.0) * (every - _squares(stats, 0.0))
    return Z * math.sqrt(max(dropped, 0.0)) + every / max(stats.tokens, 1)


def _squares(stats: SourceStats, keep: float) -> float:
    """Return the sum of squared lengths of the documents that may be used."""
    every = sum(group.tokens_squared for group in stats.groups)
    of_long = sum(group.long_tokens_squared for group in stats.groups)
    return of_long + keep * (every - of_long)


def _chosen_variance(
    stats: SourceStats, keep: float, after: float, usable: float, asked: float
) -> float:
    """Return the variance of the share of long tokens among those that a budget takes of the usable ones.

    It takes whole documents in random order: the share is a ratio over a random sample of documents.
    """
    if not usable or not asked or asked >= usable:
        return 0.0
    every = sum(group.tokens_squared for group in stats.groups)
    of_long = sum(group.long_tokens_squared for group in stats.groups)
    squares = (1 - after) ** 2 * of_long + after**2 * keep * max(every - of_long, 0.0)
    return squares / usable**2 * (usable / asked - 1)


def _wider(interval: Interval, error: float, highest: float = math.inf) -> Interval:
    """Add an independent error, as an interval has it."""
    value = interval.value
    low = value - math.hypot(value - interval.low, error)
    high = value + math.hypot(interval.high - value, error)
    return Interval(value, max(low, 0.0), min(high, highest))
