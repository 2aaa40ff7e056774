"""The manifest's entry of a source: counts before and after, and the share of long documents."""

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from megatron_long.dataset.manifest import LENGTH_STEPS, SourceInfo, share_at_least
from megatron_long.mixture.corpus_stats import NUM_BUCKETS, SourceStats


@dataclass
class SourceCounts:
    """Training documents of a source."""

    documents: int = 0
    tokens: int = 0
    long_tokens: int = 0
    documents_repeated: int = 0
    tokens_repeated: int = 0
    passes: int = 0
    by_length: NDArray[np.int64] = field(default_factory=lambda: np.zeros(NUM_BUCKETS, np.int64))

    def add(self, rows: NDArray, long_threshold_tokens: int) -> None:
        """Count rows of CHOSEN_DTYPE."""
        lengths = rows["length_tokens"].astype(np.int64)
        again = rows["repeat"] > 0
        self.documents += len(rows)
        self.tokens += int(lengths.sum())
        self.long_tokens += int(lengths[lengths >= long_threshold_tokens].sum())
        self.documents_repeated += int(again.sum())
        self.tokens_repeated += int(lengths[again].sum())
        self.passes = max(self.passes, int(rows["repeat"].max()) + 1) if len(rows) else self.passes
        self.by_length += tokens_by_length(lengths)

    def without(self, others: "SourceCounts") -> "SourceCounts":
        """Return the tokens of the documents that are not among `others`."""
        tokens, long_tokens = self.tokens - others.tokens, self.long_tokens - others.long_tokens
        return replace(self, tokens=tokens, long_tokens=long_tokens)


def tokens_by_length(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Add up tokens in documents of [2^k, 2^(k+1)) tokens, at index k.

    >>> tokens_by_length(np.array([1, 4, 7]))[:4].tolist()
    [1, 0, 11, 0]
    """
    buckets = np.frexp(lengths.astype(np.float64))[1] - 1
    return np.bincount(buckets, lengths.astype(np.float64), NUM_BUCKETS).astype(np.int64)


def shares_from_length(by_length: list[int]) -> dict[str, float]:
    """Return the share of tokens in documents of at least 4K, 16K, ... tokens.

    >>> shares_from_length([0] * 11 + [30, 10])
    {'4096': 0.25, '16384': 0.0, '32768': 0.0, '65536': 0.0, '131072': 0.0}
    """
    return {str(length): share_at_least(by_length, length) for length in LENGTH_STEPS}


def source_info(
    index: int,
    stats: SourceStats,
    counts: SourceCounts,
    valid: NDArray,
    share_asked: float,
    share_got: float,
    keep_short: float,
    documents_used: int,
    share_error: float,
    plain: SourceCounts,
) -> SourceInfo:
    """Build the manifest's entry of a source.

    Args:
        valid: Held-out rows.
        documents_used: Documents of the corpus that are in the training set, each counted once.
        share_error: Bound of the error of its share of the corpus.
        plain: Of `counts`, the documents as they are (`--short-share`).
    """
    tokens_valid = int(valid["length_tokens"].astype(np.int64).sum())
    after = np.trim_zeros(counts.by_length, "b").tolist()
    return SourceInfo(
        index=index,
        share_asked=share_asked,
        share_got=share_got,
        documents_in=stats.documents,
        tokens_in=stats.tokens,
        documents_valid=len(valid),
        tokens_valid=tokens_valid,
        documents_kept=counts.documents,
        tokens_kept=counts.tokens,
        long_share_before=stats.long_share,
        long_share_after=counts.long_tokens / counts.tokens if counts.tokens else 0.0,
        tokens_by_length_before=stats.tokens_by_length,
        tokens_by_length_after=after,
        bytes_in=stats.size_bytes,
        documents_tokenized=stats.documents_tokenized,
        tokens_tokenized=stats.tokens_tokenized,
        tokens_in_is_exact=stats.is_exact,
        documents_dropped=max(stats.documents - len(valid) - documents_used, 0),
        tokens_dropped=max(
            stats.tokens - tokens_valid - (counts.tokens - counts.tokens_repeated), 0
        ),
        documents_repeated=counts.documents_repeated,
        tokens_repeated=counts.tokens_repeated,
        passes=counts.passes,
        short_keep_ratio=keep_short,
        token_share_from_length_before=shares_from_length(stats.tokens_by_length),
        token_share_from_length_after=shares_from_length(after),
        tokens_in_error=round(stats.tokens_error),
        share_in_error=round(share_error, 9),
        long_share_before_error=round(stats.long_share_error, 9),
        documents_plain=plain.documents,
        tokens_plain=plain.tokens,
    )
