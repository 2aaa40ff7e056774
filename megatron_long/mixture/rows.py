"""Output of the first stage for each file: a row of metadata for each document, tokens, counts."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ROW_DTYPE = np.dtype(
    [
        ("source", "<u2"),
        ("file", "<u4"),
        ("line", "<u8"),
        ("length_tokens", "<u4"),
        ("drop_key", "<u8"),
        ("order_key", "<u8"),
        ("offset", "<u8"),
    ]
)
"""One row per document; `length_tokens` counts BOS and EOD, `offset` counts tokens of `tokens.bin`."""
TOKENS_FILE, ROWS_FILE, INFO_FILE = "tokens.bin", "rows.npy", "info.json"


class Stratum(NamedTuple):
    """Similar documents, by source and size."""

    source: int
    """Its place in `sources` of the same file."""
    is_proven_short: int
    """Whether the size proves that they are short, 0 or 1."""
    size_bucket: int
    """Log2 of their bytes, rounded down."""


class StratumCounts[Value](NamedTuple):
    """Counts of one stratum in a file."""

    documents: Value
    size_bytes: Value
    documents_tokenized: Value
    size_bytes_tokenized: Value
    long_tokens: Value
    """Tokens of long documents among those tokenized."""
    tokens: Value
    """Tokens of those tokenized; the rest are sums over them too, for the errors of estimates."""
    bytes_squared: Value
    tokens_squared: Value
    tokens_times_bytes: Value
    long_tokens_squared: Value
    long_tokens_times_bytes: Value


class LengthCount(NamedTuple):
    """A row of `lengths` in an `info.json`: tokens in documents of one stratum and similar length."""

    source: int
    is_proven_short: int
    size_bucket: int
    length_bucket: int
    """Log2 of their tokens, rounded down."""
    tokens: int


def size_buckets(sizes: NDArray) -> NDArray[np.int64]:
    """Return log2 of sizes, rounded down; 0 for none.

    >>> size_buckets(np.array([0, 1, 3, 4])).tolist()
    [0, 0, 1, 2]
    """
    return np.frexp(np.maximum(sizes, 1).astype(np.float64))[1].astype(np.int64) - 1


def read_strata(info: Mapping[str, Any]) -> Iterator[tuple[Stratum, StratumCounts[float]]]:
    """Yield the rows of `strata` in an `info.json`."""
    for source, is_proven_short, size_bucket, *counts in info["strata"]:
        yield Stratum(source, is_proven_short, size_bucket), StratumCounts(*counts)
