"""The files of a corpus: open them by path or fsspec URL, read their bytes or lines."""

import dataclasses
import gzip
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import xxhash

from megatron_long.corpus.stores import StoreFile
from megatron_long.errors import ConfigError, DataError

LINES = (".jsonl", ".ndjson", ".json")
"""Suffixes of files with one JSON object a line."""
COMPRESSIONS = (".gz", ".zst")
TABLES = (".parquet", ".arrow")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""At the beginning of files from Windows, and of their parts where such files were joined."""
SHARE_BYTES = 1 << 20
"""Text of a file that one share takes before it leaves as much to each of the others."""
SHARE_ROWS = 1024
"""Rows of a table, likewise."""
SUFFIXES = (*LINES, *(lines + end for end in COMPRESSIONS for lines in LINES), *TABLES)


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus."""

    name: str
    """Name in manifest and keys: relative to the `--input` folder, never absolute."""
    path: str
    """Local path or URL."""
    size_bytes: int
    version: str = ""
    """Version of the file: modification time, or the store's own tag."""
    folder: str = ""
    """First folder of the name, or the base name of the `--input` folder: a label if asked for."""
    start_bytes: int = 0
    """Where this piece of the file begins; see `pieces.py`."""
    piece_bytes: int | None = None
    """Its size; None for the whole file."""
    first_line: int = 1
    """Number of its first line or row in the file."""
    groups: tuple[int, int] | None = None
    """First row group and end, for a piece of a parquet file."""
    skip_rows: int = 0
    """Rows of the first group that lie before the piece."""
    num_rows: int | None = None
    """Rows of the piece; None for all of its groups."""
    share: tuple[int, int] = (0, 1)
    """Which share of a file that all read whole this is, and of how many; see `owns`."""
    xxh3_128: str = ""
    """Hash of the whole file, if already known."""

    @property
    def read_bytes(self) -> int:
        """Number of bytes of this piece, or of the whole file; of a share, its part of them."""
        size = self.size_bytes if self.piece_bytes is None else self.piece_bytes
        return size * (self.share[0] + 1) // self.share[1] - size * self.share[0] // self.share[1]

    def owns(self, position: int) -> bool:
        """Return whether a line that begins at a byte of the text belongs to this share.

        >>> first, second = (InputFile("a.zst", "a.zst", 9, share=(n, 2)) for n in (0, 1))
        >>> [first.owns(n << 20) for n in (0, 1, 2)], second.owns(1 << 20)
        ([True, False, True], True)
        """
        return position // SHARE_BYTES % self.share[1] == self.share[0]

    def owns_row(self, number: int) -> bool:
        """Return whether a row, numbered from 1, belongs to this share."""
        return (number - 1) // SHARE_ROWS % self.share[1] == self.share[0]


def suffix_of(path: str) -> str:
    """Return the suffix in `SUFFIXES` that a path ends in; empty if none.

    >>> suffix_of("s3://b/c4-train.00000.JSON.gz"), suffix_of("a.tar.gz")
    ('.json.gz', '')
    """
    return next((suffix for suffix in SUFFIXES if path.lower().endswith(suffix)), "")


def is_url(path: str | Path) -> bool:
    """Return whether a path is a URL.

    >>> is_url("s3://bucket/a"), is_url("a/b")
    (True, False)
    """
    return "://" in str(path)


class HashingReader(io.RawIOBase):
    """Reads a binary file, or a piece of it, and hashes what it reads.

    `finish` returns the hash of the whole file, which for a piece must be known already.
    """

    def __init__(self, raw: Any, item: InputFile) -> None:
        self._raw, self._digest, self._known = raw, xxhash.xxh3_128(), item.xxh3_128
        self._left = item.piece_bytes
        self.position = 0
        self.used_share = lambda used_bytes: 1.0
        """Share of what was read that the first bytes of the text came from: reading runs ahead."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        if self._left is not None:
            view = view[: self._left]
        count = self._raw.readinto(view) or 0
        if self._left is not None:
            self._left -= count
        if not self._known:
            self._digest.update(view[:count])
        self.position += count
        return count

    def finish(self) -> str:
        """Read the rest and return the xxh3_128 of the whole file."""
        if self._known:
            return self._known
        while self.read(1 << 20):
            pass
        return self._digest.hexdigest()


@contextmanager
def open_input(item: InputFile) -> Iterator[HashingReader]:
    """Open the stored bytes of a file, or of a piece of it."""
    with open_seekable(item, buffering=0) as raw:
        if item.start_bytes:
            raw.seek(item.start_bytes)
        yield HashingReader(raw, item)


def open_seekable(item: InputFile, buffering: int = -1) -> Any:
    """Open the stored file itself.

    Raises: DataError: it has gone since it was listed, or cannot be opened.
    """
    if is_url(item.path):
        return StoreFile(item.path)
    try:
        return open(item.path, "rb", buffering=buffering)
    except OSError as error:
        raise DataError(
            f"{item.path} cannot be opened ({error.strerror}), and was listed before; put it back, and give "
            "the same command again"
        ) from error


def hash_input(item: InputFile) -> str:
    """Return the xxh3_128 of a file of the corpus."""
    whole = dataclasses.replace(item, start_bytes=0, piece_bytes=None, xxh3_128="")
    with open_input(whole) as reader:
        return reader.finish()


def decompressed(item: InputFile, reader: HashingReader) -> IO[bytes]:
    """Return the text of a file of lines, decompressed by its suffix."""
    suffix = suffix_of(item.path)
    if suffix.endswith(".gz"):
        return cast(IO[bytes], io.BufferedReader(gzip.GzipFile(fileobj=reader), 1 << 16))
    if suffix.endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise ConfigError(f"{item.path}: reading .zst needs `pip install zstandard`") from None
        stream = _ZstandardStream(reader, zstandard.ZstdDecompressor().decompressobj)
        reader.used_share = lambda used_bytes: used_bytes / max(stream.size_bytes, 1)
        return cast(IO[bytes], io.BufferedReader(stream, 1 << 20))
    reader.used_share = lambda used_bytes: used_bytes / max(reader.position, 1)
    return cast(IO[bytes], io.BufferedReader(reader, 1 << 20))


class _ZstandardStream(io.RawIOBase):
    """Decompresses frame after frame; zstandard's own reader accepts a truncated file.

    Input pieces are small: a compressed byte can expand to 32 KiB of text, so a piece gives at most 64 MiB.
    """

    PIECE_BYTES = 2048

    def __init__(self, raw: io.RawIOBase, new_frame: Callable[[], Any]) -> None:
        self._raw, self._new_frame = raw, new_frame
        self._frame: Any = None
        self._block = self._pending = memoryview(b"")
        self.size_bytes = 0
        """Bytes of text so far."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            self._block = self._block or memoryview(self._raw.read(1 << 18) or b"")
            if not self._block:
                if self._frame is not None:
                    raise EOFError("it ends inside a compressed frame")
                return 0
            piece, self._block = self._block[: self.PIECE_BYTES], self._block[self.PIECE_BYTES :]
            self._pending = memoryview(self._decompress(bytes(piece)))
            self.size_bytes += len(self._pending)
        count = min(len(buffer), len(self._pending))
        buffer[:count], self._pending = self._pending[:count], self._pending[count:]
        return count

    def _decompress(self, block: bytes) -> bytes:
        parts = []
        while block:
            self._frame = self._frame or self._new_frame()
            parts.append(self._frame.decompress(block))
            block = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        return b"".join(parts)
