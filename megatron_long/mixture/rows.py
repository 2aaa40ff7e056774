"""Output of the first stage for each file: a row of metadata for each document, tokens, counts."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

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


class LengthCount(NamedTuple):
    """A row of `lengths` in an `info.json`: tokens in documents of one stratum and similar length."""

    source: int
    is_proven_short: int
    size_bucket: int
    length_bucket: int
    """Log2 of their tokens, rounded down."""
    tokens: int


def read_strata(info: Mapping[str, Any]) -> Iterator[tuple[Stratum, StratumCounts[int]]]:
    """Yield the rows of `strata` in an `info.json`."""
    for source, is_proven_short, size_bucket, *counts in info["strata"]:
        yield Stratum(source, is_proven_short, size_bucket), StratumCounts(*counts)
