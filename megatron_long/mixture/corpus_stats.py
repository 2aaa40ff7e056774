"""What the tasks of the first stage saw of the corpus, added up; tokens of what was not tokenized estimated.

Within a stratum (source, whether the size proves a document short, log2 of its bytes) the documents that
are tokenized are chosen by hashes alone, so the tokens of the others follow from their bytes.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_long.mixture.rows import INFO_FILE

NUM_BUCKETS = 48
DEFAULT_BYTES_PER_TOKEN = 4.0


@dataclass
class SourceStats:
    """One source of the corpus."""

    documents: int = 0
    size_bytes: int = 0
    """Bytes of text."""
    documents_tokenized: int = 0
    tokens: int = 0
    """Tokens with BOS and EOD, those of documents that were not tokenized estimated."""
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
    documents_bad: int
    bad: list[dict[str, Any]]
    text_bytes: int


def read_info(folder: Path) -> dict[str, Any]:
    """Read what a task wrote of its file."""
    return orjson.loads((folder / INFO_FILE).read_bytes())


def gather_stats(infos: Iterable[Mapping[str, Any]], max_listed: int = 1000) -> CorpusStats:
    """Add up what the tasks saw."""
    strata: dict[tuple[str, int, int], np.ndarray] = {}
    lengths: dict[tuple[str, int, int], np.ndarray] = {}
    empty = num_bad = text_bytes = 0
    bad: list[dict[str, Any]] = []
    for info in infos:
        names = info["sources"]
        for source, proven, bucket, *row in info["strata"]:
            key = names[source], proven, bucket
            strata[key] = strata.get(key, np.zeros(5, np.int64)) + row
        for source, proven, bucket, length_bucket, tokens in info["lengths"]:
            key = names[source], proven, bucket
            cells = lengths.setdefault(key, np.zeros(NUM_BUCKETS, np.int64))
            cells[length_bucket] += tokens
        empty += info["documents_empty"]
        num_bad += info["documents_bad"]
        text_bytes += info["text_bytes"]
        bad += info["bad"][: max_listed - len(bad)]
    names = sorted({key[0] for key in strata})
    return CorpusStats(dict(_by_source(names, strata, lengths)), empty, num_bad, bad, text_bytes)


def _by_source(
    names: list[str],
    strata: dict[tuple[str, int, int], np.ndarray],
    lengths: dict[tuple[str, int, int], np.ndarray],
) -> Iterator[tuple[str, SourceStats]]:
    for name in names:
        stats, by_length = SourceStats(), np.zeros(NUM_BUCKETS)
        mine = [(key, row) for key, row in strata.items() if key[0] == name]
        done_bytes = sum(int(row[3]) for _, row in mine)
        done_tokens = sum(int(lengths[key].sum()) for key, _ in mine if key in lengths)
        tokens_per_byte = done_tokens / done_bytes if done_tokens else 1 / DEFAULT_BYTES_PER_TOKEN
        long_tokens = 0.0
        for key, (documents, size_bytes, done, done_size, long) in mine:
            stats.documents += int(documents)
            stats.size_bytes += int(size_bytes)
            stats.documents_tokenized += int(done)
            if done_size:
                weight = size_bytes / done_size
                by_length += weight * lengths.get(key, np.zeros(NUM_BUCKETS))
                long_tokens += weight * long
            elif size_bytes:
                tokens = float(size_bytes) * tokens_per_byte
                by_length[int(np.log2(max(tokens / documents, 1)))] += tokens
        stats.tokens_tokenized = done_tokens
        whole = by_length.round().astype(np.int64)
        stats.tokens, stats.long_tokens = int(whole.sum()), round(long_tokens)
        stats.tokens_by_length = np.trim_zeros(whole, "b").tolist()
        yield name, stats
