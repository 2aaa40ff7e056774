"""Sources that cannot fill their budgets: what is done about tiny ones, and what to ask for instead."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_long.errors import DataError
from megatron_long.mixture.corpus_stats import CorpusStats
from megatron_long.mixture.mixture import Mixture
from megatron_long.mixture.selection import SHARE_TOLERANCE, VALID_MAX_SHARE, Group, measure
from megatron_long.mixture.shares import format_token_count, split_budget
from megatron_long.mixture.summary import SourceCounts

TINY_DOCUMENTS, TINY_SHARE = 20, 0.01
"""Sources of so few documents, together at most this share of the corpus, may be left out."""


class TooLittle(DataError):
    """Sources cannot fill their budgets.

    Args:
        train_tokens: As asked.
        short: Tokens available and asked, of each such source.
        most: Training tokens that the corpus can fill; 0 where a source has nothing left.
        others: What else would help.
        kept: Folder of the work that a command with another mixture continues.
    """

    def __init__(
        self,
        train_tokens: int,
        short: Mapping[str, tuple[int, int]],
        most: int,
        others: Sequence[str],
        kept: Path | None = None,
    ) -> None:
        self.counts = train_tokens, short, most, others
        listed = "; ".join(
            f"{name}: {usable:,} tokens available, {asked:,} asked"
            for name, (usable, asked) in short.items()
        )
        at_most = [f"at most --train-tokens {most}"] if most else []
        *first, last = [*at_most, *others]
        super().__init__(
            f"--train-tokens {format_token_count(train_tokens)} is more than the corpus can fill after "
            f"holding out validation documents and dropping short ones ({listed}); use "
            f"{', '.join(first)}{' or ' if first else ''}{last}"
            + (f"; what was tokenized is kept for that in {kept}" if kept else "")
        )


def find_short(
    budgets: Mapping[str, int], available: Mapping[str, int], allow_repeat: int
) -> dict[str, tuple[int, int]]:
    """Return the tokens that can be used, and those asked, of each source that cannot fill its budget.

    >>> find_short({"a": 10, "b": 30}, {"a": 10, "b": 14}, 2)
    {'b': (28, 30)}
    """
    usable = {name: tokens * allow_repeat for name, tokens in available.items()}
    return {
        name: (usable[name], budget) for name, budget in budgets.items() if budget > usable[name]
    }


def stop_holding_out(group: Group, stats: CorpusStats, allow_repeat: int) -> str | None:
    """Take back the held-out document of a source that is too small for one, if that fills its budget.

    Returns: A warning; None if the source stays as it is.
    """
    (name,), held_out = group.names, group.held_out
    source = stats.sources[name]
    if held_tokens(group) <= VALID_MAX_SHARE * source.tokens:
        return None
    group.held_out = held_out[:0]
    if measure(group, group.keep_short).tokens * allow_repeat >= group.budget:
        return (
            f"{name}: nothing is held out for validation, because its budget needs all that it has "
            f"({source.documents:,} documents, {source.tokens:,} tokens)"
        )
    group.held_out = held_out
    return None


def held_tokens(group: Group) -> int:
    """Return the tokens that a group holds out."""
    return int(group.rows["length_tokens"][group.held_out].astype(np.int64).sum())


def leave_out_tiny(
    shares: dict[str, float], short: Mapping[str, tuple[int, int]], stats: CorpusStats
) -> list[str]:
    """Set the shares of tiny sources that cannot fill their budgets to 0, and scale the others up.

    Returns: Warnings, one for each of them.
    """
    warnings = []
    tokens = sum(source.tokens for source in stats.sources.values())
    out = sum(source.tokens for name, source in stats.sources.items() if not shares[name])
    for name in sorted(short, key=lambda name: (stats.sources[name].tokens, name)):
        source, (usable, asked) = stats.sources[name], short[name]
        if source.documents > TINY_DOCUMENTS or out + source.tokens > TINY_SHARE * tokens:
            continue
        out += source.tokens
        shares[name] = 0.0
        warnings.append(
            f"{name}: left out of the mixture, because validation and dropped short documents leave "
            f"{usable:,} of its {source.tokens:,} tokens and its share is {asked:,}"
        )
    total = sum(shares.values())
    for name in shares:
        shares[name] /= total
    return warnings


def too_little(
    mixture: Mixture,
    shares: Mapping[str, float],
    available: Mapping[str, int],
    short: Mapping[str, tuple[int, int]],
    whole: Mapping[str, int],
) -> TooLittle:
    """Return the error of sources that cannot fill their budgets, with remedies that can work.

    Args:
        available: Tokens of each source in one pass.
        whole: The same with all short documents.
    """
    if mixture.short_share:  # what a part leaves to the other is not in proportion to the whole
        remedies = ["a lower --train-tokens", "a larger corpus"]
        return TooLittle(mixture.train_tokens, short, 0, remedies)
    others = []
    enough = sum(available.values()) * mixture.allow_repeat >= mixture.train_tokens
    if not mixture.rules.is_pooled and enough:
        empty = [name for name in short if not available[name]]
        nothing = f" with 0 for {', '.join(empty)}" if empty else ""
        others.append(f"other --source-shares{nothing}")
    fills = all(whole[name] * mixture.allow_repeat >= asked for name, (_, asked) in short.items())
    if mixture.keep_short is not None and mixture.keep_short < 1 and fills:
        others.append("a higher --short-keep-ratio")
    if all(available[name] for name in short):
        passes = max(math.ceil(asked / available[name]) for name, (_, asked) in short.items())
        others.append(f"--allow-repeat {passes}")
    most = most_tokens(shares, available, short, mixture.allow_repeat)
    if not (most or others):
        others.append("a larger corpus")
    return TooLittle(mixture.train_tokens, short, most, others)


def most_tokens(
    shares: Mapping[str, float],
    available: Mapping[str, int],
    short: Mapping[str, tuple[int, int]],
    allow_repeat: int = 1,
) -> int:
    """Return the largest budget that every source can fill; 0 if one has nothing to fill it with.

    >>> most_tokens({"a": 0.75, "b": 0.25}, {"a": 100, "b": 20}, {"b": (20, 50)})
    82
    """
    most = min(int(usable / shares[name]) + 2 * bool(usable) for name, (usable, _) in short.items())
    while most > 0 and find_short(split_budget(most, shares), available, allow_repeat):
        most -= 1
    return most


def share_warning(
    group: Group, counts: Sequence[SourceCounts], stats: CorpusStats, mixture: Mixture
) -> list[str]:
    """Return a warning, with figure and reason, if a group misses `--long-token-share`; else nothing.

    Where not every document was tokenized, the reason counts the estimated corpus.
    """
    target, tokens = mixture.long_token_share, sum(count.tokens for count in counts)
    if target is None or not tokens:
        return []
    share = sum(count.long_tokens for count in counts) / tokens
    if abs(share - target) <= SHARE_TOLERANCE:
        return []
    all_long, short_tokens = _long_and_short(group, stats)
    most = mixture.allow_repeat * all_long
    if not all_long:
        reason = "it has none"
    elif share < target and most < (target - SHARE_TOLERANCE) * tokens:
        reason = f"the budget needs the short ones: long ones have {most:,} of {tokens:,} tokens"
    elif share > target and short_tokens * mixture.allow_repeat < (1 - target) * tokens:
        reason = f"short ones have {short_tokens:,} of {tokens:,} tokens"
    elif share > target and group.long_budget is None:
        in_all = all_long / (all_long + short_tokens)
        reason = f"it is {in_all:.1%} of all that can be used, and long ones are not dropped"
    else:
        threshold = group.long_threshold_tokens
        reason = f"its budget is {tokens:,} tokens, and a long one has at least {threshold:,}"
    return [
        f"{', '.join(group.names)}: {share:.1%} of the tokens are in long documents, --long-token-share "
        f"{target:g} is out of reach ({reason})"
    ]


def _long_and_short(group: Group, stats: CorpusStats) -> tuple[int, int]:
    """Return the tokens of a group's long and short documents: of what can be used, or estimated of all."""
    sources = [stats.sources[name] for name in group.names]
    if all(source.is_exact for source in sources):
        full = measure(group, 1.0)
        return full.long_tokens, full.tokens - full.long_tokens
    long_tokens = sum(source.long_tokens for source in sources)
    return long_tokens, sum(source.tokens for source in sources) - long_tokens
