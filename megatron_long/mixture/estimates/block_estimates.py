"""Estimates of the whole corpus from a sample of its blocks, with confidence intervals.

Of each block all documents are counted, by source and size, and some are tokenized. Three errors add up:

- Between blocks: the separate ratio estimator, stratified. What the blocks of a stratum hold is divided by
  their bytes and multiplied by the bytes of its files. Blocks are one to a run, in order, so the variance is
  taken from differences of neighbors, with the finite population correction: a stratum of which every
  block was read has no such error.
- In the rest of compressed files, of which only the beginnings are read: the rest of a file is taken to
  differ from its beginning as the beginnings of two files differ. What grows or falls in all files from
  beginning to end is not seen.
- Within blocks: the tokens of documents that were not tokenized, as in `corpus_stats`. Where few of the
  blocks were read this hardly counts, for the differences between blocks hold it already.

Source: Cochran 1977, "Sampling Techniques", sections 6.10 (separate ratio estimator) and 10.3 (two stages);
Wolter 2007, "Introduction to Variance Estimation", section 8.2, estimator v2 (differences of neighbors);
Satterthwaite 1946 (degrees of freedom).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_long.corpus.blocks import BlockSample
from megatron_long.mixture.corpus_stats import CorpusStats, gather_stats
from megatron_long.mixture.estimates.intervals import (
    Interval,
    share_interval,
    total_interval,
)
from megatron_long.mixture.rows import read_strata


@dataclass(frozen=True)
class SourceEstimate:
    """One source of the corpus."""

    documents: Interval
    tokens: Interval
    share: Interval
    """Of the tokens of the corpus."""
    long_share: Interval
    """Share of its tokens in long documents."""


class CorpusEstimate:
    """The whole corpus, by what was read of its blocks.

    Attributes:
        stats: Counts and tokens, scaled to the whole corpus.
        read_share: Share of the corpus that was read, by bytes of its files.
        unread_share: Share of it that could not be sampled: what follows in compressed files.
        is_whole: Whether all of it was read.
    """

    def __init__(self, sample: BlockSample, infos: Sequence[Mapping[str, Any]]) -> None:
        self._strata = np.array([block.stratum for block in sample.blocks])
        self._members = [np.flatnonzero(self._strata == s) for s in range(len(sample.strata))]
        self._blocks = [stratum.num_blocks for stratum in sample.strata]
        runs = np.array([float(block.run_blocks) for block in sample.blocks])
        sizes = np.array([float(block.size_bytes) for block in sample.blocks])
        read = np.array([float(info["read_bytes"]) for info in infos])
        total = np.array([float(stratum.size_bytes) for stratum in sample.strata])
        represented = np.bincount(self._strata, runs * sizes, len(total))
        grown = (total / np.maximum(represented, 1.0))[self._strata]
        self._stands_for = runs * sizes * grown
        """Bytes of the corpus that each block stands for."""
        self.weights = np.where(read > 0, self._stands_for / np.maximum(read, 1.0), 0.0)
        self.stats: CorpusStats = gather_stats(infos, weights=self.weights.tolist())
        self._streams = np.array([block.item.piece_bytes is None for block in sample.blocks])
        unread = np.maximum(1 - read / np.maximum(sizes, 1), 0.0) * self._streams
        self._unread = self._stands_for * unread
        self.unread_share = float(self._unread.sum() / max(total.sum(), 1))
        self.read_share = float(read.sum() / max(total.sum(), 1))
        all_taken = all(len(m) == n for m, n in zip(self._members, self._blocks, strict=True))
        self.is_whole = all_taken and self.unread_share == 0
        self._counted = self._count(infos)

    def _count(self, infos: Sequence[Mapping[str, Any]]) -> dict[str, NDArray]:
        """Return what each block contributes to the estimate of a source: [3, blocks].

        Of documents, tokens and long tokens: what the sizes of its documents let expect, and how much those
        that were tokenized deviate from that, times the documents that each stands for.
        """
        groups = {
            (name, key): group
            for name, stats in self.stats.sources.items()
            for group in stats.groups
            for key in group.keys
        }
        counted = {name: np.zeros((3, len(infos))) for name in self.stats.sources}
        for place, info in enumerate(infos):
            for stratum, counts in read_strata(info):
                name = info["sources"][stratum.source]
                group = groups[name, (stratum.size_bucket, 1 - stratum.is_proven_short)]
                done, grown = counts.size_bytes_tokenized, group.grown
                size = counts.size_bytes - grown * done
                counted[name][:, place] += (
                    counts.documents,
                    group.rate * size + grown * counts.tokens,
                    group.long_rate * size + grown * counts.long_tokens,
                )
        return {name: values * self.weights for name, values in counted.items()}

    def variance(self, values: NDArray) -> tuple[float, float]:
        """Return the variance between blocks of the sum of `values`, and its degrees of freedom."""
        variance = weight = 0.0
        for mine, num_blocks in zip(self._members, self._blocks, strict=True):
            number = len(mine)
            if number < 2:
                continue
            bytes_of = self._stands_for[mine]
            rest = values[mine] - bytes_of * (values[mine].sum() / bytes_of.sum())
            squares = float((np.diff(rest) ** 2).sum())
            found = (1 - number / num_blocks) * number / (2 * (number - 1)) * squares
            variance += found
            weight += found**2 / (number - 1)
        if self.unread_share and (degrees := np.count_nonzero(self._streams) - 1) > 0:
            bytes_of, mine = self._stands_for[self._streams], values[self._streams]
            off = mine / bytes_of - mine.sum() / bytes_of.sum()
            found = 2 * float((off**2).sum()) / degrees * float((self._unread**2).sum())
            variance += found
            weight += found**2 / degrees
        return variance, variance**2 / weight if weight else np.inf

    def estimate(self, name: str) -> SourceEstimate:
        """Return the figures of a source."""
        stats, (documents, tokens, long_tokens) = self.stats.sources[name], self._counted[name]
        every = sum(counted[1] for counted in self._counted.values())
        total = max(sum(stats.tokens for stats in self.stats.sources.values()), 1)
        share, long_share = stats.tokens / total, stats.long_share
        own, all_within = stats.variance(), sum(s.variance() for s in self.stats.sources.values())
        within = (1 - share) ** 2 * own + share**2 * max(all_within - own, 0.0)
        between, degrees = self.variance((tokens - share * every) / total)
        size = max(stats.tokens, 1)
        long_between, long_degrees = self.variance((long_tokens - long_share * tokens) / size)
        long_within = stats.variance(-long_share, 1.0) / size**2
        count_variance, count_degrees = self.variance(documents)
        token_variance, token_degrees = self.variance(tokens)
        return SourceEstimate(
            documents=total_interval(stats.documents, count_variance, count_degrees),
            tokens=total_interval(stats.tokens, token_variance + own, token_degrees),
            share=share_interval(share, between + within / total**2, degrees),
            long_share=share_interval(
                long_share,
                long_between + long_within,
                long_degrees,
                self._observations(name),
            ),
        )

    def _observations(self, name: str) -> float:
        """Return the number of equal documents that tell the share of long ones.

        If all or none are long, blocks count: long documents may lie together, as in sorted files.
        """
        stats = self.stats.sources[name]
        if self.is_whole and stats.is_exact:
            return math.inf
        if 0 < stats.long_tokens < stats.tokens:
            return stats.observations
        return min(stats.observations, float(np.count_nonzero(self._counted[name][0])))

    def most_unseen(self) -> float:
        """Return how large a share of the corpus a source may have that no block held (95%).

        If it fills blocks of its own; if it is spread over many, it would have been seen more likely.
        """
        # The exact interval of a Poisson count of zero ends at ln 40 = 3.689.
        most = math.log(40) * float(self._stands_for.max() / self._stands_for.sum())
        return 0.0 if self.is_whole else min(most, 1.0)
