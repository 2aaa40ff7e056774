"""Corpus counts summed over the tasks of the first stage, with estimates for documents not tokenized.

Within a stratum (source, whether the size proves a document short, log2 of its bytes) the documents that
are tokenized are chosen only by hashes, so the tokens of the others can be estimated from their bytes.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_long.mixture.rows import INFO_FILE, LengthCount, StratumCounts, read_strata

NUM_BUCKETS = 48
DEFAULT_BYTES_PER_TOKEN = 4.0

BySize = dict[tuple[int, int], np.ndarray]
"""By whether the size proves a document short, and log2 of its bytes."""


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

    @property
    def is_exact(self) -> bool:
        """Whether every document was tokenized."""
        return self.documents_tokenized == self.documents


@dataclass
class CorpusStats:
    """All files together."""

    sources: dict[str, SourceStats]
    documents_empty: int
    documents_by_reference: int
    """Tokenized by the reference because of characters that the engine classifies otherwise."""
    documents_bad: int
    bad: list[dict[str, Any]]
    text_bytes: int


def read_info(folder: Path) -> dict[str, Any]:
    """Read what a task wrote about its file."""
    return orjson.loads((folder / INFO_FILE).read_bytes())


def gather_stats(infos: Iterable[Mapping[str, Any]], max_listed: int = 1000) -> CorpusStats:
    """Add up the counts of the tasks."""
    strata: dict[str, BySize] = defaultdict(dict)
    lengths: dict[str, BySize] = defaultdict(dict)
    empty = by_reference = num_bad = text_bytes = 0
    bad: list[dict[str, Any]] = []
    for info in infos:
        names = info["sources"]
        for stratum, counts in read_strata(info):
            key = stratum.is_proven_short, stratum.size_bucket
            mine = strata[names[stratum.source]]
            mine[key] = mine.get(key, 0) + np.array(counts, np.int64)
        for count in map(LengthCount._make, info["lengths"]):
            key, mine = (count.is_proven_short, count.size_bucket), lengths[names[count.source]]
            cells = mine.setdefault(key, np.zeros(NUM_BUCKETS, np.int64))
            cells[count.length_bucket] += count.tokens
        empty += info["documents_empty"]
        by_reference += info["documents_by_reference"]
        num_bad += info["documents_bad"]
        text_bytes += info["text_bytes"]
        bad += info["bad"][: max_listed - len(bad)]
    sources = {name: _source_stats(strata[name], lengths[name]) for name in sorted(strata)}
    return CorpusStats(sources, empty, by_reference, num_bad, bad, text_bytes)


def _source_stats(strata: BySize, lengths: BySize) -> SourceStats:
    """Add up a source.

    Args:
        strata: `StratumCounts` of each.
        lengths: Tokens by log2 of the length, of each that has some.
    """
    stats, by_length = SourceStats(), np.zeros(NUM_BUCKETS)
    counted = {key: StratumCounts(*row.tolist()) for key, row in strata.items()}
    done_bytes = sum(counts.size_bytes_tokenized for counts in counted.values())
    stats.tokens_tokenized = sum(int(cells.sum()) for cells in lengths.values())
    tokens_per_byte = 1 / DEFAULT_BYTES_PER_TOKEN
    if stats.tokens_tokenized:
        tokens_per_byte = stats.tokens_tokenized / done_bytes
    long_tokens = 0.0
    for key, counts in counted.items():
        stats.documents += counts.documents
        stats.size_bytes += counts.size_bytes
        stats.documents_tokenized += counts.documents_tokenized
        if counts.size_bytes_tokenized:
            weight = counts.size_bytes / counts.size_bytes_tokenized
            by_length += weight * lengths.get(key, np.zeros(NUM_BUCKETS))
            long_tokens += weight * counts.long_tokens
        elif counts.size_bytes:
            tokens = counts.size_bytes * tokens_per_byte
            by_length[int(np.log2(max(tokens / counts.documents, 1)))] += tokens
    whole = by_length.round().astype(np.int64)
    stats.tokens, stats.long_tokens = int(whole.sum()), round(long_tokens)
    stats.tokens_by_length = np.trim_zeros(whole, "b").tolist()
    return stats
