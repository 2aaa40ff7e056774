"""Large files in pieces, so that one file keeps many workers busy.

Plain files of lines are divided at line ends, .parquet files between row groups. What is compressed from end
to end (.gz, .zst) can only be read from its beginning: if there are too few files for the workers, each of
them decompresses all of it and tokenizes a share of the lines; so it is with .arrow files, and with .parquet
files of few row groups. A document keeps the number of its line (or row) in the file, so its keys, and with
them the dataset, are the same whatever the pieces. To know the lines before each piece, a plain file is read
once beforehand, which also gives its hash.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_long.corpus.blocks import EXPANSION
from megatron_long.corpus.inputs import (
    COMPRESSIONS,
    LINES,
    InputFile,
    hash_input,
    open_input,
    open_seekable,
    suffix_of,
)
from megatron_long.errors import DataError
from megatron_long.files import atomic_path
from megatron_long.preprocess.executors import ExecutorOptions, run_stage

logger = logging.getLogger(__name__)

PIECE_BYTES = 64 << 20
"""Size of a piece, about; smaller files are not divided."""
STAGE_NAME = "pieces"


@dataclass(frozen=True)
class Piece:
    """A part of a file."""

    start_bytes: int
    piece_bytes: int
    first_line: int
    """Number of its first line, or row, in the file, from 1."""
    groups: tuple[int, int] | None = None
    """First row group and end, in a parquet file."""
    share: tuple[int, int] = (0, 1)
    """Number and count, in a file without pieces."""


@dataclass(frozen=True)
class PiecesStage:
    """Item i is large file i: find where its pieces begin."""

    work: Path
    files: tuple[InputFile, ...]
    piece_bytes: int
    shares: tuple[int, ...]
    """How many shares each file gets if it has not as many pieces."""
    name: str = STAGE_NAME

    def path(self, index: int) -> Path:
        """Where the pieces of file `index` are listed."""
        return self.work / self.name / f"{index:06d}.json"

    def is_done(self, index: int) -> bool:
        """Tell whether a file was scanned."""
        return self.path(index).exists()

    def run(self, index: int) -> None:
        """Go through a file."""
        item, count = self.files[index], self.shares[index]
        pieces, digest = find_pieces(item, self.piece_bytes)
        if len(pieces) < count and suffix_of(item.path) not in LINES:
            pieces = [Piece(0, item.size_bytes, 1, share=(n, count)) for n in range(count)]
        content = {"name": item.name, "xxh3_128": digest, "pieces": [asdict(p) for p in pieces]}
        with atomic_path(self.path(index)) as temporary:
            temporary.write_bytes(orjson.dumps(content))


def split_inputs(
    files: Sequence[InputFile], work: Path, options: ExecutorOptions
) -> list[InputFile]:
    """Give the files, large ones in pieces, in their order."""
    large = tuple(item for item in files if _text_bytes(item) > PIECE_BYTES)
    total = sum(map(_text_bytes, files))
    # Kept in the work folder: another number of workers resumes with the same shares.
    shares = tuple(max(round(options.workers * _text_bytes(item) / total), 1) for item in large)
    stage = PiecesStage(work, large, PIECE_BYTES, shares)
    run_stage(stage, len(large), options)
    contents = {item.name: stage.path(index) for index, item in enumerate(large)}
    items: list[InputFile] = []
    for item in files:
        if item.name in contents:
            items += _pieces(item, orjson.loads(contents[item.name].read_bytes()))
        else:
            items.append(item)
    if len(items) < options.workers:
        logger.warning(
            "--workers %d: the corpus has %d files or pieces of files to read, so only as many workers "
            "have work; small files are not divided: make more of them",
            options.workers,
            len(items),
        )
    return items


def find_pieces(item: InputFile, piece_bytes: int) -> tuple[list[Piece], str]:
    """Divide a file into pieces of about `piece_bytes`; give them and the hash of the whole file.

    What is compressed from end to end is one piece, and not hashed: that is done when it is read.

    Raises: DataError: the file changed meanwhile.
    """
    if suffix_of(item.path).endswith(COMPRESSIONS):
        return [Piece(0, item.size_bytes, 1)], ""
    if suffix_of(item.path) == ".arrow":
        return [Piece(0, item.size_bytes, 1)], hash_input(item)
    if suffix_of(item.path) == ".parquet":
        try:
            return list(_row_groups(item, piece_bytes)), hash_input(item)
        except (OSError, ValueError):  # damaged: reading it as a whole tells what is wrong
            return [Piece(0, item.size_bytes, 1)], hash_input(item)
    return _find_lines(item, piece_bytes)


def _find_lines(item: InputFile, piece_bytes: int) -> tuple[list[Piece], str]:
    starts, position, lines = [(0, 1)], 0, 0  # the first byte and the number of its line
    with open_input(item) as reader:
        while block := reader.read(1 << 20):
            while (begin := starts[-1][0] + piece_bytes - position - 1) < len(block):
                end = block.find(b"\n", begin) + 1
                if not end:
                    break
                starts.append((position + end, lines + block.count(b"\n", 0, end) + 1))
            lines += block.count(b"\n")
            position += len(block)
        digest = reader.finish()
    if position != item.size_bytes:
        raise DataError(f"{item.path} changed while it was read; start again when it is complete")
    starts = [(start, line) for start, line in starts if start < position] or starts[:1]
    ends = [start for start, _ in starts[1:]] + [position]
    pieces = [
        Piece(start, end - start, line) for (start, line), end in zip(starts, ends, strict=True)
    ]
    return pieces, digest


def _row_groups(item: InputFile, piece_bytes: int) -> Iterator[Piece]:
    from pyarrow import parquet

    with open_seekable(item) as raw, parquet.ParquetFile(raw) as file:
        metadata = file.metadata
        rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    bytes_per_row = item.size_bytes / max(sum(rows), 1)
    first = row = start = 0
    for index in range(len(rows)):
        end = round(bytes_per_row * (row + sum(rows[first : index + 1])))
        if end - start >= piece_bytes or index == len(rows) - 1:
            yield Piece(start, end - start, row + 1, (first, index + 1))
            row, start, first = row + sum(rows[first : index + 1]), end, index + 1


def known_hashes(work: Path) -> dict[str, str]:
    """Give the hashes of the files that were scanned so far."""
    contents = (orjson.loads(path.read_bytes()) for path in (work / STAGE_NAME).glob("*.json"))
    return {content["name"]: content["xxh3_128"] for content in contents if content["xxh3_128"]}


def _pieces(item: InputFile, content: dict[str, Any]) -> Iterator[InputFile]:
    for piece in content["pieces"]:
        groups = tuple(piece.pop("groups") or ()) or None
        share = tuple(piece.pop("share"))
        yield dataclasses.replace(
            item, **piece, groups=groups, share=share, xxh3_128=content["xxh3_128"]
        )


def _text_bytes(item: InputFile) -> int:
    return item.size_bytes if suffix_of(item.path) in LINES else round(item.size_bytes * EXPANSION)
