"""Which documents a training set takes: held out, kept, used until the budget is met to the token.

Rows of a source come sorted by `order_key` from disk and are read in chunks, so memory does not grow with
the corpus. The order in which a source is used is independent of lengths, so that cutting it at its
budget prefers neither short nor long documents.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_long.mixture.external_sort import iterate_rows
from megatron_long.mixture.keys import below, mix_keys

CHOSEN_DTYPE = np.dtype(
    [
        ("source", "<u2"),
        ("file", "<u4"),
        ("line", "<u8"),
        ("length_tokens", "<u4"),
        ("offset", "<u8"),
        ("repeat", "<u2"),
        ("key", "<u8"),
    ]
)
"""One row per training document (or piece): tokens it has in the dataset, and where its text's tokens
start in the `tokens.bin` of its file; `key` orders the documents of a source within a pass."""
VALID_MAX_SHARE = 0.1
"""No source gives more than this share of its tokens to validation (but see `choose_valid`)."""
SHARE_TOLERANCE = 1e-3
SOLVER_STEPS = 40


@dataclass(frozen=True)
class Cut:
    """How a document lies in the dataset: whole, or in pieces."""

    overhead: int
    """BOS and EOD, which each piece has."""
    room: int = 2**62
    """Most tokens of text in a piece; the default cuts nothing."""


@dataclass
class Group:
    """Sources that share a budget: one source, or all of them when they are pooled."""

    names: list[str]
    rows: NDArray
    """ROW_DTYPE, sorted by `order_key`."""
    budget: int
    long_threshold_tokens: int
    cut: Cut
    keep_short: float = 1.0
    """Probability with which a short document is kept: given, or solved for."""
    held_out: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Sorted indices of rows that are used for validation."""


@dataclass(frozen=True)
class Supply:
    """What a group offers at some probability of keeping short documents."""

    tokens: int
    """In one pass over all documents that may be used."""
    long_share: float
    """Share of the tokens taken that is in long documents."""
    long_tokens: int
    """Tokens of long documents in one pass."""
    grain: float
    """Share of the budget that the longest document has: the limit of accuracy of shares."""


def choose_valid(
    rows: NDArray, sources: Mapping[int, tuple[int, float]], target_tokens: int
) -> NDArray[np.int64]:
    """Choose held-out documents: of each source in key order until `target_tokens` are reached.

    Documents that would exceed VALID_MAX_SHARE of the source are skipped. If none fits, the
    shortest is taken, provided another remains.

    Args:
        rows: ROW_DTYPE, sorted by `order_key`.
        sources: Tokens of each source (by its index), and the probability below which keys may be held out.
    Returns: Sorted indices of rows.
    """
    if target_tokens == 0:
        return np.zeros(0, np.int64)
    taken = dict.fromkeys(sources, 0)
    shortest: dict[int, tuple[int, int]] = {}
    seen = dict.fromkeys(sources, 0)
    chosen: list[int] = []
    start = 0
    for chunk in iterate_rows(rows):
        for source, (tokens, limit) in sources.items():
            mine = np.flatnonzero((chunk["source"] == source) & below(chunk["order_key"], limit))
            seen[source] += len(mine)
            for place, length in zip(
                mine.tolist(), chunk["length_tokens"][mine].tolist(), strict=True
            ):
                if taken[source] >= target_tokens:
                    break
                shortest[source] = min(
                    shortest.get(source, (length, start + place)), (length, start + place)
                )
                if taken[source] + length <= VALID_MAX_SHARE * tokens:
                    chosen.append(start + place)
                    taken[source] += length
        start += len(chunk)
        done = all(taken[source] >= target_tokens for source in sources)
        if done or not any(
            below(chunk["order_key"][-1:], limit).any() for _, limit in sources.values()
        ):
            break
    spare = [shortest[source][1] for source in sources if not taken[source] and seen[source] > 1]
    return np.array(sorted(chosen + spare), np.int64)


def stored_lengths(cut: Cut, lengths: NDArray) -> NDArray[np.int64]:
    """Return the tokens of documents in the dataset: more than their own if they are cut.

    Each piece begins with BOS (if the tokenizer adds it) and ends with EOD.

    >>> stored_lengths(Cut(overhead=2, room=8), np.array([10, 11])).tolist()
    [10, 13]
    """
    lengths = lengths.astype(np.int64)
    return lengths + (_num_pieces(cut, lengths) - 1) * cut.overhead


def measure(group: Group, keep_short: float) -> Supply:
    """Return what a group offers if short documents are kept with this probability."""
    supply = taken = long_taken = long_supply = longest = 0
    limit = group.budget
    for chunk in _usable(group, keep_short):
        lengths = stored_lengths(group.cut, chunk["length_tokens"])
        ends = supply + np.cumsum(lengths)
        inside = np.minimum(lengths, np.maximum(limit - (ends - lengths), 0))
        taken += int(inside.sum())
        is_long = chunk["length_tokens"] >= group.long_threshold_tokens
        long_taken += int(inside[is_long].sum())
        supply += int(lengths.sum())
        long_supply += int(lengths[is_long].sum())
        longest = max(longest, int(lengths.max()))
    grain = min(longest / limit, 1.0) if limit else 0.0
    return Supply(supply, long_taken / taken if taken else 0.0, long_supply, grain)


def solve_keep_short(group: Group, target: float, needed: float, highest: float) -> float:
    """Find the probability of keeping short documents that gives long ones the share `target`.

    Long documents are never downsampled: a group at or above the share keeps everything, and so does one
    without long documents. A group that would then not fill its budget keeps as many as fill it.

    Args:
        needed: Tokens of one pass that fill the budget.
        highest: Probability up to which short documents were tokenized.
    Returns: The probability; `highest` also if it should be higher.
    """
    full = measure(group, highest)
    is_above = full.long_tokens >= target * full.tokens
    if is_above or not full.long_tokens or full.tokens <= needed or full.long_share > target:
        return highest
    # From 0 to 1 for any `highest`, because the same steps give the same probability.
    low, high = 0.0, 1.0
    for _ in range(SOLVER_STEPS):
        middle = (low + high) / 2
        if middle > highest:
            high = middle
            continue
        got = measure(group, middle)
        if got.tokens < needed or got.long_share > target:
            low = middle
        else:
            high = middle
        if got.tokens >= needed and abs(got.long_share - target) < SHARE_TOLERANCE / 10:
            return middle
    return min(high, highest)


def fill_budget(group: Group) -> Iterator[NDArray]:
    """Take documents in order to exactly the budget, cutting the last one, in whole passes if necessary.

    Yields: CHOSEN_DTYPE; a later pass has another order, but the documents that the last, partial
        pass takes follow `order_key` too.
    """
    left, repeat = group.budget, 0
    while left > 0:
        before = left
        for chunk in _usable(group, group.keep_short):
            pieces = _pieces(chunk, group.cut, repeat)
            ends = np.cumsum(pieces["length_tokens"].astype(np.int64))
            count = int(np.searchsorted(ends, left)) + 1
            if count <= len(pieces):
                pieces = pieces[:count]
                pieces["length_tokens"][-1] -= ends[count - 1] - left
                left = 0
                yield pieces
                return
            left -= int(ends[-1])
            yield pieces
        assert left < before, "a group without documents has a budget"
        repeat += 1


def _usable(group: Group, keep_short: float) -> Iterator[NDArray]:
    """Yield rows that may be used for training, in chunks."""
    start = 0
    for chunk in iterate_rows(group.rows):
        usable = chunk["length_tokens"] >= group.long_threshold_tokens
        usable |= below(chunk["drop_key"], keep_short)
        first, last = np.searchsorted(group.held_out, (start, start + len(chunk)))
        usable[group.held_out[first:last] - start] = False
        if usable.any():
            yield chunk[usable]
        start += len(chunk)


def _num_pieces(cut: Cut, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.maximum(-(-(lengths - cut.overhead) // cut.room), 1)


def _pieces(chunk: NDArray, cut: Cut, repeat: int) -> NDArray:
    lengths = chunk["length_tokens"].astype(np.int64)
    counts = _num_pieces(cut, lengths)
    index = np.repeat(np.arange(len(chunk)), counts)
    number = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces = np.zeros(len(index), CHOSEN_DTYPE)
    for name in ("source", "file", "line"):
        pieces[name] = chunk[name][index]
    skipped = number * cut.room
    pieces["offset"] = chunk["offset"][index] + skipped.astype(np.uint64)
    pieces["length_tokens"] = (
        np.minimum(lengths[index] - cut.overhead - skipped, cut.room) + cut.overhead
    )
    pieces["repeat"] = repeat
    pieces["key"] = mix_keys(mix_keys(chunk["order_key"][index], repeat), number)
    return pieces
