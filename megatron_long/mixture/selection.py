"""Which documents a training set takes: held out, kept, used until the budget is met to the token.

Rows of a source come sorted by `order_key` from disk and are read in chunks, so memory does not grow with
the corpus. The order in which a source is used is independent of lengths, so that cutting it at its
budget prefers neither short nor long documents.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
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
SHARE_TOLERANCE = 5e-3
"""How far the share of long documents may be from the one asked for without a warning."""
MOST_TRIMMED = 512
"""Long documents of a budget where cutting one to the threshold matters: SHARE_TOLERANCE / 5 of it."""
SOLVER_TOLERANCE = 1e-4
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
    long_budget: int | None = None
    """Tokens of long documents, if they and the short ones are counted apart (`count_apart`)."""
    trimmed: dict[int, int] = field(default_factory=dict)
    """Tokens left of long documents that are cut so that the last one stays long, by row."""
    plain_budget: int = 0
    """Tokens of documents as they are, which are taken first, besides `budget`."""
    plain_stop: int = 0
    """Row behind the last of them: what `budget` takes begins there."""


@dataclass(frozen=True)
class Supply:
    """What a group offers at some probability of keeping short documents."""

    tokens: int
    """In one pass over all documents that may be used."""
    long_share: float
    """Share of the tokens taken that is in long documents."""
    long_tokens: int
    """Tokens of long documents in one pass."""


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
    supply = taken = long_taken = long_supply = 0
    limit = group.budget
    for _, chunk in _usable(group, keep_short):
        lengths = stored_lengths(group.cut, chunk["length_tokens"])
        ends = supply + np.cumsum(lengths)
        inside = np.minimum(lengths, np.maximum(limit - (ends - lengths), 0))
        taken += int(inside.sum())
        is_long = chunk["length_tokens"] >= group.long_threshold_tokens
        long_taken += int(inside[is_long].sum())
        supply += int(lengths.sum())
        long_supply += int(lengths[is_long].sum())
    return Supply(supply, long_taken / taken if taken else 0.0, long_supply)


def take_plain(group: Group, limit: float) -> int:
    """Set aside the first documents of a group in key order, whatever their lengths, for `plain_budget`.

    Args:
        limit: Probability of the keys below which every document was tokenized.
    Returns: Tokens found, at most the budget; the group is unchanged if they are fewer.
    """
    group.plain_stop, taken = 0, 0
    for rows, chunk in _usable(group, 1.0) if group.plain_budget else ():
        inside = below(chunk["order_key"], limit)
        ends = taken + np.cumsum(chunk["length_tokens"][inside].astype(np.int64))
        count = int(np.searchsorted(ends, group.plain_budget))
        if count < len(ends):
            group.plain_stop = int(rows[count]) + 1
            return group.plain_budget
        taken = int(ends[-1]) if len(ends) else taken
        if not inside.all():
            break
    return taken


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
        if got.tokens >= needed and abs(got.long_share - target) < SOLVER_TOLERANCE:
            return middle
    return min(high, highest)


def count_apart(group: Group, target: float, highest: float, passes: int) -> bool:
    """Give long documents the share `target` of the budget, and short ones the rest, each in key order.

    For groups where one order of all documents misses the share: those with few long documents in
    the budget. Short documents are those with the lowest drop keys that fill their part up to the place where
    the last long document lies, so what lies behind it need not be known.

    Args:
        highest: Probability up to which short documents were tokenized.
        passes: How many times a document may be used.
    Returns: Whether there are enough documents; if not, the group stays as it is.
    """
    supply = measure(group, highest)
    before, long_tokens = group.keep_short, round(target * group.budget)
    if not 0 < long_tokens <= passes * supply.long_tokens:
        return False
    stop = _trim(group, long_tokens, supply.long_tokens)
    assert group.long_budget is not None
    wanted = group.budget - group.long_budget
    if group.long_budget > supply.long_tokens:  # the same short documents in each pass
        wanted = -(-wanted * supply.long_tokens // group.long_budget)

    def short_tokens(keep_short: float, stop: int | None) -> int:
        found = _usable(group, keep_short, is_long=False, stop=stop)
        return sum(int(chunk["length_tokens"].astype(np.int64).sum()) for _, chunk in found)

    group.keep_short = highest
    if short_tokens(highest, stop) >= wanted:
        group.keep_short = _lowest(lambda keep: short_tokens(keep, stop) >= wanted, highest)
    elif highest < 1 or passes * short_tokens(1.0, None) < group.budget - group.long_budget:
        group.keep_short, group.long_budget, group.trimmed = before, None, {}
        return False
    return True


def _lowest(suffices: Callable[[float], bool], highest: float) -> float:
    """Return the lowest probability that suffices; the same for any `highest`, which does."""
    low, high = 0.0, 1.0
    for _ in range(SOLVER_STEPS):
        middle = (low + high) / 2
        if middle > highest or suffices(middle):
            high = middle
        else:
            low = middle
    return min(high, highest)


def _trim(group: Group, long_tokens: int, in_a_pass: int) -> int:
    """Set `long_budget` and `trimmed` so that no long document is cut to a short one.

    Returns: Index of the row behind the last long document of the first pass.
    """
    threshold = group.long_threshold_tokens
    passes, left = divmod(long_tokens, in_a_pass)
    group.long_budget, group.trimmed = long_tokens, {}
    longest: list[tuple[int, int]] = []
    taken = stop = 0
    for rows, chunk in _usable(group, 0.0, is_long=True):
        lengths = chunk["length_tokens"].astype(np.int64)
        count = int(np.searchsorted(taken + np.cumsum(lengths), left))
        best = np.argsort(lengths[:count])[-MOST_TRIMMED:]
        found = zip(lengths[best].tolist(), rows[best].tolist(), strict=True)
        longest = sorted([*longest, *found])[-MOST_TRIMMED:]
        taken += int(lengths[:count].sum())
        stop = int(rows[min(count, len(rows) - 1)]) + 1
        if count < len(rows):
            break
    rest = left - taken
    if 0 < rest < threshold:
        missing = threshold - rest
        near = min(rest, missing) <= SHARE_TOLERANCE / 5 * group.budget
        spare = sum(length - threshold for length, _ in longest)
        if passes == 0 and not near and spare >= missing:
            for length, row in reversed(longest):
                given = min(length - threshold, missing)
                if given:
                    group.trimmed[row], missing = length - given, missing - given
        elif rest <= missing or long_tokens + missing > group.budget:
            group.long_budget -= rest
        else:
            group.long_budget += missing
    return len(group.rows) if passes else stop


def measure_long_share(group: Group) -> float:
    """Return the share of the budget that `fill_upsampled` gives to documents long in the dataset."""
    long_tokens = 0
    for pieces in fill_upsampled(group):
        lengths = pieces["length_tokens"].astype(np.int64)
        long_tokens += int(lengths[lengths >= group.long_threshold_tokens].sum())
    return long_tokens / group.budget


def fill_plain(group: Group) -> Iterator[NDArray]:
    """Take documents as they are to exactly `plain_budget`, cutting the last one; see `fill_upsampled`."""
    return _fill(group, group.plain_budget, plain=True)


def fill_upsampled(group: Group) -> Iterator[NDArray]:
    """Take documents in order to exactly the budget, cutting the last one, in whole passes if necessary.

    Yields: CHOSEN_DTYPE; a later pass has another order, but the documents that the last, partial
        pass takes follow `order_key` too.
    """
    if group.long_budget is None:
        return _fill(group, group.budget)
    return itertools.chain(
        _fill(group, group.long_budget, is_long=True),
        _fill(group, group.budget - group.long_budget, is_long=False),
    )


def _fill(
    group: Group, left: int, is_long: bool | None = None, *, plain: bool = False
) -> Iterator[NDArray]:
    repeat = 0
    keep_short = 1.0 if plain else group.keep_short
    while left > 0:
        before = left
        for _, chunk in _usable(group, keep_short, is_long, plain=plain):
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


def _usable(
    group: Group,
    keep_short: float,
    is_long: bool | None = None,
    stop: int | None = None,
    *,
    plain: bool = False,
) -> Iterator[tuple[NDArray[np.int64], NDArray]]:
    """Yield the indices of rows that may be used for training, and the rows, in chunks.

    Args:
        is_long: Only long documents, or only short ones.
        stop: Only rows before.
        plain: Only those set aside by `take_plain`, else only those behind.
    """
    start, stop = (0, group.plain_stop) if plain else (group.plain_stop, stop)
    for chunk in iterate_rows(group.rows, start, stop):
        long = chunk["length_tokens"] >= group.long_threshold_tokens
        usable = long | below(chunk["drop_key"], keep_short)
        if is_long is not None:
            usable &= long == is_long
        first, last = np.searchsorted(group.held_out, (start, start + len(chunk)))
        usable[group.held_out[first:last] - start] = False
        for row, length_tokens in group.trimmed.items():
            if start <= row < start + len(chunk):
                chunk["length_tokens"][row - start] = length_tokens
        if usable.any():
            places = np.flatnonzero(usable)
            yield start + places, chunk[places]
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
