"""A probability sample of the corpus: blocks of bytes, at random positions in every stratum of files.

A document belongs to the block in which its first byte lies, so the blocks divide the documents, whatever
their lengths, and a block is found without reading what is before it. In a parquet file rows count as equally
long; of a group of rows, what lies before a block is decoded. What is compressed from end to end
(.gz, .zst) has no such blocks: the file is one, read from its beginning as far as the sample may read.

The strata are the files, or, where there are many, files of one folder and similar size. A stratum is
cut into as many runs of blocks as it gives to the sample, and a random block of each is taken, so the
sample is spread evenly over sizes and positions, also if the documents are sorted.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_long.corpus.inputs import LINES, InputFile, open_seekable, suffix_of

MAX_STRATA = 256
MIN_BLOCKS = 4
"""Of a stratum, if it has as many: fewer would not tell how much blocks differ."""
BLOCK_BYTES = 1 << 20
MIN_BLOCK_BYTES = 1 << 14
GROUP_BLOCKS = 8
"""Most blocks of a group of rows, in a parquet file that is sampled alone: each decodes what is before it."""
STREAM_FACTOR = 8
"""How many times more of compressed files is read."""
EXPANSION = 3.5
"""Text of compressed files, about: only affects how many are read."""
SAMPLED = "sampled"
"""Instead of the hash of a file that is not read whole."""


@dataclass(frozen=True)
class Block:
    """One block of the sample."""

    item: InputFile
    """The documents that begin in it, as a piece of their file; the whole file if that is compressed."""
    stratum: int
    run_blocks: int
    """Blocks of the run that it stands for."""
    size_bytes: int
    """Its weight: what is read of it stands for so many bytes of files."""
    max_text_bytes: int | None = None
    """Read at most this; None for all."""

    @property
    def text_bytes(self) -> float:
        """Text that is read of it, about."""
        size = expected_text(self.item)
        return min(size, size if self.max_text_bytes is None else self.max_text_bytes)


@dataclass(frozen=True)
class Stratum:
    """Files that are sampled together."""

    size_bytes: int
    num_blocks: int


@dataclass(frozen=True)
class BlockSample:
    """The blocks, by stratum and position, and what they were taken from."""

    blocks: list[Block]
    strata: list[Stratum]


def expected_text(item: InputFile) -> float:
    """Return about how many bytes of text a file, or a piece of it, has."""
    return item.read_bytes * (1.0 if _kind(item) in LINES else EXPANSION)


def sample_blocks(files: Sequence[InputFile], text_bytes: int, seed: int) -> BlockSample:
    """Choose blocks with about `text_bytes` of text, the same for the same files and seed.

    Of compressed files STREAM_FACTOR times as much is read: their documents are found by reading.
    """
    files = [item for item in files if item.size_bytes]
    groups = _strata(files, text_bytes)
    total_cost = sum(map(_cost, files))
    block_bytes = text_bytes // max(MIN_BLOCKS * len(groups), 1)
    block_bytes = min(max(block_bytes, MIN_BLOCK_BYTES), BLOCK_BYTES)
    rng = np.random.default_rng([seed, len(files)])
    chosen: list[tuple[InputFile, int, int, int, int]] = []
    sizes: list[tuple[int, int]] = []
    for group in groups:
        size = max(block_bytes, _least_block(group))
        counts = [_num_blocks(item, size) for item in group]
        ends, num_blocks = np.cumsum(counts), sum(counts)
        # Each stratum gets blocks by its share of the cost: as many of each are taken of its own.
        number = round(text_bytes * num_blocks / max(total_cost, 1.0))
        number = min(max(number, MIN_BLOCKS), num_blocks)
        bounds = np.arange(number + 1) * num_blocks // number
        for place, run in zip(rng.integers(bounds[:-1], bounds[1:]), np.diff(bounds), strict=True):
            index = int(np.searchsorted(ends, place, "right"))
            inside = int(place - (ends[index] - counts[index]))
            chosen.append((group[index], inside, len(sizes), int(run), size))
        sizes.append((sum(item.size_bytes for item in group), num_blocks))
    streams = [item.size_bytes * EXPANSION for item, *_ in chosen if not _has_blocks(item)]
    limit = _limit(streams, 1.5 * STREAM_FACTOR * text_bytes)
    blocks = [_block(*block, limit) for block in chosen]
    return BlockSample(_with_documents(blocks), [Stratum(*size) for size in sizes])


def _strata(files: Sequence[InputFile], text_bytes: int) -> list[list[InputFile]]:
    """Divide the files: each alone, or by folder, kind and size, or by less, until strata are few enough."""
    mean_cost = sum(
        min(_cost(item), BLOCK_BYTES if _has_blocks(item) else _cost(item)) for item in files
    )
    affordable = int(text_bytes / max(mean_cost / max(len(files), 1), 1.0)) // MIN_BLOCKS
    if len(files) <= MAX_STRATA:
        return [[item] for item in files]
    keys = (
        lambda item: (item.folder, _kind(item), item.size_bytes.bit_length()),
        lambda item: (item.folder, _kind(item)),
        lambda item: (_kind(item), item.size_bytes.bit_length()),
    )
    for key in keys:
        groups: dict[object, list[InputFile]] = defaultdict(list)
        for item in sorted(files, key=lambda item: (item.size_bytes, item.name)):
            groups[key(item)].append(item)
        if len(groups) <= min(max(affordable, 8), MAX_STRATA):
            break
    return list(groups.values())


def _limit(sizes: Sequence[float], budget: float) -> int | None:
    """Return how much of each file may be read, so that all are read alike and within the budget.

    >>> _limit([10, 40, 60], 70), _limit([10, 40], 70)
    (30, None)
    """
    for place, size in enumerate(sorted(sizes)):
        left = len(sizes) - place
        if size * left > budget:
            return max(int(budget / left), 1)
        budget -= size
    return None


def _kind(item: InputFile) -> str:
    return suffix_of(item.path)


def _has_blocks(item: InputFile) -> bool:
    return suffix_of(item.path) in (*LINES, ".parquet")


def _num_blocks(item: InputFile, block_bytes: int) -> int:
    return -(-item.size_bytes // block_bytes) if _has_blocks(item) else 1


def _cost(item: InputFile) -> float:
    """Return what reading a file costs, in bytes of text of a plain file."""
    return item.size_bytes * (1.0 if _has_blocks(item) else EXPANSION / STREAM_FACTOR)


def _block(
    item: InputFile, inside: int, stratum: int, run_blocks: int, block_bytes: int, limit: int | None
) -> Block:
    piece = dataclasses.replace(item, xxh3_128=SAMPLED)
    if not _has_blocks(item):
        return Block(piece, stratum, run_blocks, item.size_bytes, limit)
    start, end = inside * block_bytes, min((inside + 1) * block_bytes, item.size_bytes)
    piece = _piece(piece, start, end)
    return Block(piece, stratum, run_blocks, piece.read_bytes)


def _with_documents(blocks: Sequence[Block]) -> list[Block]:
    """Make sure of a document in each stratum: a file always has one at its beginning."""
    found = {block.stratum for block in blocks if block.item.read_bytes}
    blocks = list(blocks)
    for place, block in enumerate(blocks):
        if block.stratum not in found:
            found.add(block.stratum)
            item = _piece(block.item, 0, 1)
            blocks[place] = dataclasses.replace(block, item=item, size_bytes=item.read_bytes)
    return blocks


def _piece(item: InputFile, start: int, end: int) -> InputFile:
    """Return the documents that begin in [start, end)."""
    return (_lines if _kind(item) in LINES else _rows)(item, start, end)


def _lines(item: InputFile, start: int, end: int) -> InputFile:
    """Return the lines that begin in [start, end)."""
    with open_seekable(item) as raw:
        first, last = _line_start(raw, start, item), _line_start(raw, end, item)
    # No number of a line is known; what is put instead keeps the keys of documents apart.
    return dataclasses.replace(
        item, start_bytes=first, piece_bytes=last - first, first_line=first + 1
    )


def _line_start(raw: object, place: int, item: InputFile) -> int:
    """Return where the first line begins that does not begin before `place`."""
    if place == 0 or place >= item.size_bytes:
        return min(place, item.size_bytes)
    raw.seek(place - 1)  # type: ignore[attr-defined]
    position = place - 1
    for chunk in _chunks(raw):
        found = chunk.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(chunk)
    return item.size_bytes


def _chunks(raw: object) -> Iterator[bytes]:
    while chunk := raw.read(1 << 16):  # type: ignore[attr-defined]
        yield chunk


def _group_rows(item: InputFile) -> list[int]:
    """Return the number of rows of each group of a parquet file; nothing if it is damaged."""
    from pyarrow import parquet

    try:
        with open_seekable(item) as raw, parquet.ParquetFile(raw) as file:
            found = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            return [group.num_rows for group in found]
    except (OSError, ValueError):
        return []


def _least_block(items: Sequence[InputFile]) -> int:
    """Return the bytes of the smallest block of files that are sampled together."""
    rows = _group_rows(items[0]) if len(items) == 1 and _kind(items[0]) == ".parquet" else []
    return items[0].size_bytes * max(rows) // (sum(rows) * GROUP_BLOCKS) if sum(rows) else 0


def _rows(item: InputFile, start: int, end: int) -> InputFile:
    """Return the rows of a parquet file that begin in [start, end), if all are equally long."""
    ends = np.cumsum([0, *_group_rows(item)])
    total = int(ends[-1])
    if not total:  # reading it as a whole tells what is wrong
        return item
    first, last = (-(-place * total // item.size_bytes) for place in (start, end))
    group = int(np.searchsorted(ends, first, "right")) - 1
    begin, stop = (row * item.size_bytes // total for row in (first, last))
    return dataclasses.replace(
        item,
        start_bytes=begin,
        piece_bytes=stop - begin,
        first_line=first + 1,
        groups=(group, max(int(np.searchsorted(ends, last)), group)),
        skip_rows=first - int(ends[group]),
        num_rows=last - first,
    )
