"""The order of a training set: each source in random order, spread evenly over the whole set.

With plain shuffling every window of the file has a random share of each source. Here the documents of a
source are shuffled and each gets the position of its middle among the tokens of its source, from 0
to 1; all documents are then merged by position. A window's share of a source is off by about a document.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_long.dataset.manifest import OrderInfo
from megatron_long.mixture.external_sort import (
    CHUNK_ROWS,
    iterate_rows,
    new_rows,
    release,
    sort_on_disk,
)
from megatron_long.mixture.selection import CHOSEN_DTYPE

WINDOW_TOKENS = 4_000_000


def order_documents(
    chosen: NDArray, num_sources: int, num_passes: int, folder: Path, name: str = "order"
) -> NDArray:
    """Put the chosen documents in training order, on disk.

    Args:
        chosen: CHOSEN_DTYPE in any order.
        num_passes: One more than the highest `repeat`.
        folder: Where files are written: `NAME.rows` holds the result.
    """

    def groups_and_keys(chunk: NDArray) -> tuple[NDArray, NDArray[np.uint64]]:
        groups = chunk["source"].astype(np.int64) * num_passes + chunk["repeat"]
        return groups, chunk["key"].astype(np.uint64)

    path = folder / f"{name}.shuffled"
    shuffled, bounds = sort_on_disk(
        lambda: iterate_rows(chosen), path, CHOSEN_DTYPE, num_sources * num_passes, groups_and_keys
    )
    starts = bounds[::num_passes].tolist()
    positions = _positions(shuffled, starts, folder / f"{name}.positions")
    ordered = new_rows(folder / f"{name}.rows", CHOSEN_DTYPE, len(chosen))
    place = 0
    for rows in _merge(shuffled, positions, starts):
        ordered[place : place + len(rows)] = rows
        place += len(rows)
        release(ordered)
    ordered.flush()
    for suffix in ("shuffled", "positions"):
        (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    return ordered[:place]


def measure_evenness(
    chunks: Iterable[NDArray], tokens: Sequence[int], window_tokens: int = WINDOW_TOKENS
) -> OrderInfo:
    """Measure shares of sources in each whole window of consecutive tokens.

    Args:
        chunks: Rows with `source` and `length_tokens`, in the order of the file.
        tokens: Tokens of each source in the whole file.
    """
    total, num_sources = sum(tokens), len(tokens)
    edges = np.arange(0, total + 1, window_tokens)
    at_edges = np.zeros((num_sources, len(edges)))
    before, done = 0, np.zeros(num_sources)
    for rows in chunks:
        lengths = rows["length_tokens"].astype(np.int64)
        ends = np.concatenate([[before], before + np.cumsum(lengths)])
        first, last = np.searchsorted(edges, (before, ends[-1]), side="right")
        first -= int(edges[first - 1] == before)
        for source in range(num_sources):
            mine = np.concatenate([[0], np.cumsum(np.where(rows["source"] == source, lengths, 0))])
            at_edges[source, first:last] = done[source] + np.interp(edges[first:last], ends, mine)
            done[source] += mine[-1]
        before = int(ends[-1])
    if len(edges) < 2:
        return OrderInfo(window_tokens, 0, 0.0, 0.0)
    shares = np.diff(at_edges, axis=1) / window_tokens
    deviation = np.abs(shares - np.array(tokens)[:, None] / total)
    return OrderInfo(window_tokens, len(edges) - 1, float(deviation.mean()), float(deviation.max()))


def _positions(shuffled: NDArray, starts: list[int], path: Path) -> NDArray[np.float64]:
    """Return the middle of each document among the tokens of its source, from 0 to 1."""
    positions = new_rows(path, np.float64, len(shuffled))
    for start, stop in itertools.pairwise(starts):
        total = sum(
            int(rows["length_tokens"].astype(np.int64).sum())
            for rows in iterate_rows(shuffled, start, stop)
        )
        place, before = start, 0
        for rows in iterate_rows(shuffled, start, stop):
            lengths = rows["length_tokens"].astype(np.int64)
            ends = before + np.cumsum(lengths)
            positions[place : place + len(rows)] = (ends - lengths / 2) / total
            place, before = place + len(rows), int(ends[-1])
            release(positions)
    return positions


def _merge(
    shuffled: NDArray, positions: NDArray[np.float64], starts: list[int]
) -> Iterator[NDArray]:
    """Merge the sources by position, a range of positions at a time."""
    spans = list(itertools.pairwise(starts))
    num_ranges = -(-len(shuffled) // CHUNK_ROWS)
    for index in range(num_ranges):
        low, high = index / num_ranges, (index + 1) / num_ranges
        parts, places = [], []
        for start, stop in spans:
            mine = positions[start:stop]
            first, last = start + np.searchsorted(mine, (low, high))
            parts.append(np.array(shuffled[first:last]))
            places.append(np.array(positions[first:last]))
        order = np.argsort(np.concatenate(places), kind="stable")
        yield np.concatenate(parts)[order]
        release(shuffled)
        release(positions)
