"""Sort records that do not fit into memory: a counting sort by key prefix on disk, then bucket by bucket."""

import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

PREFIX_BITS = 12
CHUNK_ROWS = 1 << 18
"""Approximate number of records held in memory at a time."""

GroupsAndKeys = Callable[[NDArray], tuple[NDArray, NDArray[np.uint64]]]
"""Gives the group (from 0) and the key of each record of a chunk."""


def sort_on_disk(
    chunks: Callable[[], Iterable[NDArray]],
    path: Path,
    dtype: np.dtype,
    num_groups: int,
    groups_and_keys: GroupsAndKeys,
) -> tuple[NDArray, NDArray[np.int64]]:
    """Sort records by group and key into a file; the sort is stable.

    Args:
        chunks: Returns all records, the same each time; it is called twice.
        path: The file to write.
    Returns: The sorted records, memory mapped; where each group starts, and the end [num_groups + 1].
    """
    counts = np.zeros((num_groups, 1 << PREFIX_BITS), np.int64)
    for chunk in chunks():
        groups, keys = groups_and_keys(chunk)
        np.add.at(counts, (groups, _prefix(keys)), 1)
    ends = np.cumsum(counts.ravel())
    total = int(ends[-1])
    bounds = np.concatenate([[0], ends[(1 << PREFIX_BITS) - 1 :: 1 << PREFIX_BITS]])
    if total == 0:
        return np.zeros(0, dtype), bounds
    records = new_rows(path, dtype, total)
    _scatter(chunks(), records, ends - counts.ravel(), groups_and_keys)
    for start, stop in _runs(ends, bounds):
        part = np.array(records[start:stop])
        records[start:stop] = part[np.argsort(groups_and_keys(part)[1], kind="stable")]
        release(records)
    records.flush()
    return records, bounds


def new_rows(path: Path, dtype: DTypeLike, count: int) -> np.memmap:
    """Map a new file of zeros whose space is reserved.

    Without that, writing to the map while the disk is full would end the process with SIGBUS.

    Raises: OSError: no space is left.
    """
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(count, 1) * np.dtype(dtype).itemsize)
    return np.memmap(path, dtype, "r+", shape=(max(count, 1),))


def iterate_rows(rows: NDArray, start: int = 0, stop: int | None = None) -> Iterator[NDArray]:
    """Yield rows in chunks, each a copy in memory."""
    stop = len(rows) if stop is None else stop
    for first in range(start, stop, CHUNK_ROWS):
        yield np.array(rows[first : min(first + CHUNK_ROWS, stop)])
        release(rows)


def release(rows: NDArray) -> None:
    """Release the memory that a memory-mapped array holds; written data stays in its file."""
    mapped = getattr(rows, "_mmap", None)
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


def _prefix(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (keys >> np.uint64(64 - PREFIX_BITS)).astype(np.int64)


def _scatter(
    chunks: Iterable[NDArray],
    records: NDArray,
    free: NDArray[np.int64],
    groups_and_keys: GroupsAndKeys,
) -> None:
    """Put each record into its bucket; `free` is the next free place of each bucket."""
    touched = 0
    for chunk in chunks:
        groups, keys = groups_and_keys(chunk)
        bucket = groups.astype(np.int64) << PREFIX_BITS | _prefix(keys)
        order = np.argsort(bucket, kind="stable")
        found, first, count = np.unique(bucket[order], return_index=True, return_counts=True)
        rank = np.arange(len(bucket)) - np.repeat(first, count)
        records[np.repeat(free[found], count) + rank] = chunk[order]
        free[found] += count
        touched += len(chunk)
        if touched >= CHUNK_ROWS // 8:  # rows are far apart: each may hold a page
            release(records)
            touched = 0


def _runs(ends: NDArray[np.int64], bounds: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Join neighbouring buckets of one group up to CHUNK_ROWS; a bucket is never split."""
    for index in range(len(bounds) - 1):
        start, stop = int(bounds[index]), int(bounds[index + 1])
        edges = ends[index << PREFIX_BITS : (index + 1) << PREFIX_BITS]
        while start < stop:
            position = int(np.searchsorted(edges, start + CHUNK_ROWS, side="right")) - 1
            end = int(edges[position]) if position >= 0 else start
            if end <= start:  # one bucket is larger than a chunk
                end = int(edges[np.searchsorted(edges, start, side="right")])
            yield start, end
            start = end
