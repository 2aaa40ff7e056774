"""Which documents a training set takes, from their lengths and keys alone.

Every document has two independent keys, uniform in [0, 2^64): `drop_key` decides whether a short one
is kept, `order_key` in which order a source is used up. Validation documents come first in that order,
then training documents until the source's budget is met. All of it is arithmetic on arrays, so the
result depends neither on the number of workers nor on the order of reading.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_long.data.manifest import SourceInfo
from megatron_long.data.shares import (
    NATURAL,
    SHARES_RULE,
    SLIMPAJAMA,
    resolve_shares,
    split_budget,
)
from megatron_long.errors import ConfigError, DataError

CORPUS_DTYPE = np.dtype(
    [
        ("source", "<u2"),
        ("file", "<u4"),
        ("line", "<u8"),
        ("length_tokens", "<u8"),
        ("drop_key", "<u8"),
        ("order_key", "<u8"),
    ]
)
"""One row per document of the corpus; lengths count BOS and EOD."""
PLAN_DTYPE = np.dtype([("document", "<u8"), ("length_tokens", "<u8"), ("repeat", "<u4")])
"""One row per training document: its row in the corpus, the tokens taken of it, which pass it is."""

VALID_MAX_SHARE = 0.1
"""No source gives more than this share of its tokens to validation (but see `_choose_valid`)."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What the training set should hold."""

    train_tokens: int
    """Tokens of the training set, met exactly."""
    strategy: str = "per-source"
    """A key of STRATEGIES."""
    short_keep_ratio: float = 0.1
    """Probability with which a document shorter than the threshold is kept."""
    long_threshold_tokens: int = 4096
    """Documents with at least this many tokens are long."""
    source_shares: str | Mapping[str, float] = NATURAL
    """`natural`, `slimpajama`, or the share of each source (normalized to a sum of 1)."""
    missing_sources: str = "error"
    """`error`, or `drop` to leave out shares of sources that the corpus lacks."""
    valid_tokens_per_source: int = 200_000
    """Tokens that each source holds out, in whole documents."""
    allow_repeat: int = 1
    """How many times one document may be used."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"--strategy {self.strategy}: choose one of {', '.join(STRATEGIES)}")
        if not 0 <= self.short_keep_ratio <= 1:
            raise ConfigError(f"--short-keep-ratio {self.short_keep_ratio} is not within 0 and 1")
        if self.missing_sources not in ("error", "drop"):
            raise ConfigError(f"missing_sources is {self.missing_sources!r}; use error or drop")
        lowest = {"train_tokens": 1, "valid_tokens_per_source": 0, "allow_repeat": 1}
        lowest["long_threshold_tokens"] = 1
        for name, minimum in lowest.items():
            if getattr(self, name) < minimum:
                flag = "--" + name.removesuffix("_tokens" if "long" in name else "").replace(
                    "_", "-"
                )
                raise ConfigError(f"{flag} {getattr(self, name)} is too small; at least {minimum}")
        if isinstance(self.source_shares, str) and self.source_shares not in (NATURAL, SLIMPAJAMA):
            raise ConfigError(f"--source-shares {self.source_shares}: {SHARES_RULE}")


@dataclass(frozen=True)
class MixturePlan:
    """The documents of a dataset in their order."""

    rows: NDArray
    """PLAN_DTYPE, in training order."""
    valid: dict[str, NDArray[np.int64]]
    """Rows of the corpus that each source holds out, in file order."""
    sources: dict[str, SourceInfo]


Strategy = Callable[[Mixture, NDArray], NDArray[np.float64]]
"""Gives the probability to keep each document of one source from the mixture and their lengths."""


def keep_all(mixture: Mixture, lengths: NDArray) -> NDArray[np.float64]:
    """Keep every document: natural lengths, the shares alone are as asked."""
    return np.ones(len(lengths))


def keep_long(mixture: Mixture, lengths: NDArray) -> NDArray[np.float64]:
    """Keep long documents always and short ones with `short_keep_ratio`, in every source alike.

    Source: Fu et al. 2024, section 3.1 ("per-source length upsampling").
    """
    is_long = lengths >= mixture.long_threshold_tokens
    return np.where(is_long, 1.0, mixture.short_keep_ratio)


STRATEGIES: dict[str, Strategy] = {"per-source": keep_long, "original": keep_all}


def plan_mixture(corpus: NDArray, sources: Sequence[str], mixture: Mixture) -> MixturePlan:
    """Choose and order the documents of a dataset.

    Args:
        corpus: CORPUS_DTYPE [documents]; `source` is an index into `sources`.
        sources: Names of the sources.
    Raises: DataError: a source cannot fill its budget. ConfigError: the shares do not fit the corpus.
    """
    lengths = corpus["length_tokens"].astype(np.int64)
    tokens_in = np.bincount(corpus["source"], lengths, len(sources)).astype(np.int64).tolist()
    shares = resolve_shares(
        mixture.source_shares, mixture.missing_sources, dict(zip(sources, tokens_in, strict=True))
    )
    budgets = split_budget(mixture.train_tokens, shares)
    valid: dict[str, NDArray[np.int64]] = {}
    candidates: dict[str, NDArray[np.int64]] = {}
    by_key = np.lexsort((corpus["line"], corpus["file"], corpus["order_key"]))
    for index, name in enumerate(sources):
        ordered = by_key[corpus["source"][by_key] == index]
        held_out = _choose_valid(lengths[ordered], mixture.valid_tokens_per_source)
        if held_out.any():
            valid[name] = np.sort(ordered[held_out])
        rest = ordered[~held_out]
        probability = STRATEGIES[mixture.strategy](mixture, lengths[rest])
        candidates[name] = rest[_uniform(corpus["drop_key"][rest]) < probability]
    available = {name: int(lengths[rows].sum()) for name, rows in candidates.items()}
    _check_supply(available, budgets, shares, mixture)
    chosen = [_fill_budget(candidates[name], lengths, budgets[name]) for name in sources]
    rows = np.concatenate(chosen)
    keys = _mix64(corpus["order_key"][rows["document"]], rows["repeat"])
    rows = rows[np.lexsort((rows["repeat"], rows["document"], keys))]
    infos = _summarize(corpus, sources, mixture, rows, valid, shares)
    return MixturePlan(rows, valid, infos)


def _choose_valid(lengths: NDArray, target_tokens: int) -> NDArray[np.bool_]:
    """Mark held-out documents of one source, whose lengths come in key order.

    Documents are taken in order until `target_tokens` are reached, passing over those that would go
    beyond VALID_MAX_SHARE of the source. If none fits, the shortest is taken, provided another remains.
    """
    marked = np.zeros(len(lengths), np.bool_)
    if target_tokens == 0 or len(lengths) < 2:
        return marked
    limit, taken = VALID_MAX_SHARE * lengths.sum(), 0
    for index, length in enumerate(lengths.tolist()):
        if taken + length <= limit:
            marked[index] = True
            taken += length
        if taken >= target_tokens:
            break
    if not taken:
        marked[np.argmin(lengths)] = True
    return marked


def _fill_budget(rows: NDArray[np.int64], lengths: NDArray, budget: int) -> NDArray:
    """Take documents in order until exactly `budget` tokens, the last one cut, going round if need be."""
    ends = np.cumsum(lengths[rows])
    passes, rest = divmod(budget, int(ends[-1])) if budget else (0, 0)
    num_last = int(np.searchsorted(ends, rest)) + 1 if rest else 0
    parts = [rows] * passes + [rows[:num_last]]
    plan = np.zeros(sum(map(len, parts)), PLAN_DTYPE)
    plan["document"] = np.concatenate(parts)
    plan["length_tokens"] = lengths[plan["document"]]
    plan["repeat"] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    if num_last:
        plan["length_tokens"][-1] -= ends[num_last - 1] - rest
    return plan


def _check_supply(
    available: Mapping[str, int],
    budgets: Mapping[str, int],
    shares: Mapping[str, float],
    mixture: Mixture,
) -> None:
    usable = {name: tokens * mixture.allow_repeat for name, tokens in available.items()}
    short = [name for name in budgets if budgets[name] > usable[name]]
    if not short:
        return
    most = min(int(usable[name] / share) for name, share in shares.items() if share > 0)
    listed = "; ".join(
        f"{name}: {usable[name]:,} tokens available, {budgets[name]:,} asked" for name in short
    )
    passes = max(math.ceil(budgets[name] / max(available[name], 1)) for name in short)
    repeat = f" or --allow-repeat {passes}" if all(available[name] for name in short) else ""
    raise DataError(
        f"--train-tokens {mixture.train_tokens} is more than the corpus can fill after holding out "
        f"validation documents and dropping short ones ({listed}); use at most --train-tokens {most}, "
        f"other --source-shares, a higher --short-keep-ratio{repeat}"
    )


def _uniform(keys: NDArray[np.uint64]) -> NDArray[np.float64]:
    return (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix64(keys: NDArray[np.uint64], repeat: NDArray) -> NDArray[np.uint64]:
    """Scramble keys (splitmix64's finalizer), differently in each pass: the global order."""
    mixed = keys + (repeat.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _summarize(
    corpus: NDArray,
    sources: Sequence[str],
    mixture: Mixture,
    rows: NDArray,
    valid: Mapping[str, NDArray[np.int64]],
    shares: Mapping[str, float],
) -> dict[str, SourceInfo]:
    infos: dict[str, SourceInfo] = {}
    row_sources = corpus["source"][rows["document"]]
    for index, name in enumerate(sources):
        before = corpus["length_tokens"][corpus["source"] == index]
        after = rows["length_tokens"][row_sources == index]
        held_out = corpus["length_tokens"][valid.get(name, np.zeros(0, np.int64))]
        infos[name] = SourceInfo(
            index=index,
            share_asked=shares[name],
            share_got=int(after.sum()) / mixture.train_tokens,
            documents_in=len(before),
            tokens_in=int(before.sum()),
            documents_valid=len(held_out),
            tokens_valid=int(held_out.sum()),
            documents_kept=len(after),
            tokens_kept=int(after.sum()),
            long_share_before=_long_share(before, mixture.long_threshold_tokens),
            long_share_after=_long_share(after, mixture.long_threshold_tokens),
            tokens_by_length_before=_tokens_by_length(before),
            tokens_by_length_after=_tokens_by_length(after),
        )
    return infos


def _long_share(lengths: NDArray, threshold: int) -> float:
    total = int(lengths.sum())
    return int(lengths[lengths >= threshold].sum()) / total if total else 0.0


def _tokens_by_length(lengths: NDArray) -> list[int]:
    buckets = np.frexp(lengths.astype(np.float64))[1] - 1
    return np.bincount(buckets, lengths.astype(np.float64)).astype(np.int64).tolist()
