"""Corpus counts summed over the tasks of the first stage, with estimates for documents not tokenized.

Within a stratum (source, whether the size proves a document short, log2 of its bytes) the documents that
are tokenized are chosen only by hashes: a simple random sample. Their tokens per byte, times the bytes of all
documents of the stratum, which are known, is the ratio estimate of its tokens; strata are added up. The error
follows from how much the documents deviate from the ratio, with the finite population correction: a stratum
whose documents were all tokenized has none.

Source: Cochran 1977, "Sampling Techniques", chapter 6 (separate ratio estimator, equation 6.46 with 6.12) and
section 5A.12 (collapsed strata).
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_long.corpus.documents import MAX_LISTED_PER_FILE
from megatron_long.mixture.estimates.intervals import Z
from megatron_long.mixture.rows import INFO_FILE, LengthCount, StratumCounts, read_strata

NUM_BUCKETS = 48
DEFAULT_BYTES_PER_TOKEN = 4.0
MIN_TOKENIZED = 5
"""Strata with fewer tokenized documents are estimated together with their neighbor in size."""

Key = tuple[int, int]
"""Log2 of the bytes of a document, and 1 if the size does not prove it short."""


@dataclass
class _Cell:
    """What is known of a stratum."""

    seen: np.ndarray = field(default_factory=lambda: np.zeros(len(StratumCounts._fields)))
    """`StratumCounts`: as they are,"""
    weighted: np.ndarray = field(default_factory=lambda: np.zeros(len(StratumCounts._fields)))
    """times the weights of the tasks,"""
    squared: np.ndarray = field(default_factory=lambda: np.zeros(len(StratumCounts._fields)))
    """and times the squares of the weights."""
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(NUM_BUCKETS))
    """Weighted tokens by log2 of the length."""

    def __iadd__(self, other: "_Cell") -> "_Cell":
        self.seen = self.seen + other.seen
        self.weighted = self.weighted + other.weighted
        self.squared = self.squared + other.squared
        self.lengths = self.lengths + other.lengths
        return self


@dataclass(frozen=True)
class Group:
    """A stratum, or neighbors that are estimated together."""

    keys: tuple[Key, ...]
    documents: float
    size_bytes: float
    documents_tokenized: float
    size_bytes_tokenized: float
    rate: float
    """Tokens per byte."""
    long_rate: float
    """Tokens in long documents per byte."""
    tokens_squared: float
    """Sum of the squared lengths of all documents, estimated,"""
    long_tokens_squared: float
    """and of the long ones."""
    moments: tuple[float, float, float, float, float]
    """Sums over tokenized documents: squares of bytes, of tokens, of long tokens, and the products of
    tokens and of long tokens with bytes."""
    expansion: float
    """What the variance of one tokenized document is multiplied by."""

    @property
    def grown(self) -> float:
        """How many bytes each tokenized byte stands for."""
        return self.size_bytes / self.size_bytes_tokenized if self.size_bytes_tokenized else 0.0

    def variance(self, by_tokens: float, by_long: float) -> float:
        """Return the variance of `by_tokens` * tokens + `by_long` * long tokens, as estimated."""
        if not self.documents_tokenized:  # the rate is a guess
            return ((abs(by_tokens) + abs(by_long)) * self.rate * self.size_bytes / Z) ** 2
        return self.expansion * self.squared_residuals(by_tokens, by_long)

    def squared_residuals(self, by_tokens: float, by_long: float) -> float:
        """Return the sum over tokenized documents of the squared deviation from the ratio."""
        squares, tokens2, long2, tokens_bytes, long_bytes = self.moments
        # A long document's tokens are its long tokens, so their product is the square of the latter.
        value2 = by_tokens**2 * tokens2 + (2 * by_tokens * by_long + by_long**2) * long2
        if self.size_bytes_tokenized**2 < 2 * squares:
            return value2  # one document, or one that is all of the bytes, tells no deviation
        product = by_tokens * tokens_bytes + by_long * long_bytes
        rate = by_tokens * self.rate + by_long * self.long_rate
        return max(value2 - 2 * rate * product + rate**2 * squares, 0.0)


@dataclass
class SourceStats:
    """One source of the corpus."""

    documents: int = 0
    size_bytes: int = 0
    """Bytes of text."""
    documents_tokenized: int = 0
    tokens: int = 0
    """Tokens with BOS and EOD; estimated for documents that were not tokenized."""
    tokens_tokenized: int = 0
    long_tokens: int = 0
    """Tokens of long documents, likewise."""
    tokens_by_length: list[int] = field(default_factory=list)
    """Tokens in documents of [2^k, 2^(k+1)) tokens at index k, likewise."""
    groups: list[Group] = field(default_factory=list)

    @property
    def is_exact(self) -> bool:
        """Whether every document was tokenized."""
        return self.documents_tokenized == self.documents

    @property
    def long_share(self) -> float:
        """Share of the tokens in long documents."""
        return self.long_tokens / self.tokens if self.tokens else 0.0

    def variance(self, by_tokens: float = 1.0, by_long: float = 0.0) -> float:
        """Return the variance of `by_tokens` * tokens + `by_long` * long tokens, as estimated."""
        if not self.documents_tokenized and self.documents:
            return (by_tokens * self.tokens / Z) ** 2  # a guess
        return sum(group.variance(by_tokens, by_long) for group in self.groups)

    @property
    def observations(self) -> float:
        """Number of equal documents that would tell as much as those tokenized (Kish 1965)."""
        squares = sum(group.grown**2 * group.moments[0] for group in self.groups)
        return sum(group.size_bytes for group in self.groups) ** 2 / squares if squares else 0.0

    @property
    def tokens_error(self) -> float:
        """Bound of the error of `tokens`, in 95 of 100 cases."""
        return Z * math.sqrt(self.variance())

    @property
    def long_share_error(self) -> float:
        """Bound of the error of `long_share`, likewise."""
        return Z * math.sqrt(self.variance(-self.long_share, 1.0)) / max(self.tokens, 1)


@dataclass
class CorpusStats:
    """All files together."""

    sources: dict[str, SourceStats]
    documents_empty: int
    documents_by_reference: int
    """Tokenized by the reference because of characters that the engine classifies differently."""
    documents_bad: int
    bad: list[dict[str, Any]]
    text_bytes: int

    def share_errors(self) -> dict[str, float]:
        """Return the bound of the error of each source's share of the tokens, in 95 of 100 cases.

        The share of a source is wrong by its own error and by that of all others.
        """
        variances = {name: stats.variance() for name, stats in self.sources.items()}
        total = max(sum(stats.tokens for stats in self.sources.values()), 1)
        everything = sum(variances.values())
        errors = {}
        for name, stats in self.sources.items():
            share, own = stats.tokens / total, variances[name]
            others = max(everything - own, 0.0)
            errors[name] = Z * math.sqrt((1 - share) ** 2 * own + share**2 * others) / total
        return errors


def read_info(folder: Path) -> dict[str, Any]:
    """Read what a task wrote about its file."""
    return orjson.loads((folder / INFO_FILE).read_bytes())


def gather_stats(
    infos: Iterable[Mapping[str, Any]],
    max_listed: int = 1000,
    weights: Sequence[float] | None = None,
) -> CorpusStats:
    """Add up the counts of the tasks.

    Args:
        weights: How many times each task counts: if they are a sample of the corpus.
    """
    cells: dict[str, dict[Key, _Cell]] = defaultdict(lambda: defaultdict(_Cell))
    empty = by_reference = num_bad = text_bytes = 0
    bad: dict[str, list[dict[str, Any]]] = {}
    for place, info in enumerate(infos):
        names = info["sources"]
        weight = 1.0 if weights is None else weights[place]
        for stratum, counts in read_strata(info):
            row = np.array(counts)
            cell = cells[names[stratum.source]][stratum.size_bucket, 1 - stratum.is_proven_short]
            cell += _Cell(row, weight * row, weight**2 * row)
        for count in map(LengthCount._make, info["lengths"]):
            cell = cells[names[count.source]][count.size_bucket, 1 - count.is_proven_short]
            cell.lengths[count.length_bucket] += weight * count.tokens
        empty += info["documents_empty"]
        by_reference += info.get("documents_by_reference", 0)
        num_bad += info["documents_bad"]
        text_bytes += info["text_bytes"]
        for one in info["bad"]:
            if one["file"] in bad or len(bad) < max_listed:
                bad.setdefault(one["file"], []).append(one)
    sources = {name: _source_stats(cells[name]) for name in sorted(cells)}
    # The same documents are listed, whatever the pieces or shares that files were read in.
    first = [sorted(of, key=lambda one: one["line"])[:MAX_LISTED_PER_FILE] for of in bad.values()]
    listed = list(itertools.chain(*first))[:max_listed]
    return CorpusStats(sources, empty, by_reference, num_bad, listed, text_bytes)


def _source_stats(cells: Mapping[Key, _Cell]) -> SourceStats:
    """Add up a source."""
    stats, by_length, long_tokens = SourceStats(), np.zeros(NUM_BUCKETS), 0.0
    seen = StratumCounts(*sum(cell.seen for cell in cells.values()).tolist())  # type: ignore[union-attr]
    every = StratumCounts(*sum(cell.weighted for cell in cells.values()).tolist())  # type: ignore[union-attr]
    stats.documents, stats.size_bytes = round(every.documents), round(every.size_bytes)
    stats.documents_tokenized = round(seen.documents_tokenized)
    stats.tokens_tokenized = round(seen.tokens)
    for keys in _together(cells):
        cell = _Cell()
        for key in keys:
            cell += cells[key]
        group = _group(keys, cell)
        stats.groups.append(group)
        long_tokens += group.size_bytes * group.long_rate
        by_length += group.grown * cell.lengths
        if not group.size_bytes_tokenized:
            tokens = group.size_bytes / DEFAULT_BYTES_PER_TOKEN
            by_length[int(np.log2(max(tokens / max(group.documents, 1), 1)))] += tokens
    whole = by_length.round().astype(np.int64)
    stats.tokens, stats.long_tokens = int(whole.sum()), round(long_tokens)
    stats.tokens_by_length = np.trim_zeros(whole, "b").tolist()
    return stats


def _together(cells: Mapping[Key, _Cell]) -> list[list[Key]]:
    """Divide the strata of a source, by size, into groups that have enough tokenized documents.

    A stratum that was tokenized whole stays alone: its ratio need not be that of others.
    """

    def counts_of(keys: Sequence[Key]) -> StratumCounts[float]:
        return StratumCounts(*sum(cells[key].seen for key in keys).tolist())  # type: ignore[union-attr]

    def is_whole(keys: Sequence[Key]) -> bool:
        return counts_of(keys).documents_tokenized == counts_of(keys).documents

    def is_thin(keys: Sequence[Key]) -> bool:
        return counts_of(keys).documents_tokenized < min(MIN_TOKENIZED, counts_of(keys).documents)

    groups: list[list[Key]] = []
    for key in sorted(cells):
        is_apart = is_whole([key]) or (groups and is_whole(groups[-1]))
        if groups and not is_apart and (is_thin(groups[-1]) or is_thin([key])):
            groups[-1].append(key)
        else:
            groups.append([key])
    return groups


def _group(keys: Sequence[Key], cell: _Cell) -> Group:
    seen, every = StratumCounts(*cell.seen.tolist()), StratumCounts(*cell.weighted.tolist())
    squared = StratumCounts(*cell.squared.tolist())
    done = every.size_bytes_tokenized
    grown = every.size_bytes / done if done else 0.0
    number = seen.documents_tokenized
    # Of a sample of blocks, (1 - f2) times f1: how blocks differ is counted apart (Cochran, 10.15).
    missing = (seen.documents - number) / max(every.documents, 1.0)
    return Group(
        tuple(keys),
        every.documents,
        every.size_bytes,
        number,
        done,
        every.tokens / done if done else 1 / DEFAULT_BYTES_PER_TOKEN,
        every.long_tokens / done if done else 0.0,
        grown * every.tokens_squared,
        grown * every.long_tokens_squared,
        (
            squared.bytes_squared,
            squared.tokens_squared,
            squared.long_tokens_squared,
            squared.tokens_times_bytes,
            squared.long_tokens_times_bytes,
        ),
        missing * grown**2 * number / max(number - 1, 1),
    )
