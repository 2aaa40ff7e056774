"""The files of a corpus: find them, open them by path or fsspec URL, read their bytes or lines.

A file is identified by its name relative to the user's path, so a corpus keeps its keys when it is moved.
"""

import dataclasses
import gzip
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import xxhash

from megatron_long.errors import ConfigError, DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


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
    xxh3_128: str = ""
    """Hash of the whole file, if already known."""

    @property
    def read_bytes(self) -> int:
        """Number of bytes of this piece, or of the whole file."""
        return self.size_bytes if self.piece_bytes is None else self.piece_bytes


def is_url(path: str | Path) -> bool:
    """Return whether a path is a URL.

    >>> is_url("s3://bucket/a"), is_url("a/b")
    (True, False)
    """
    return "://" in str(path)


def file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path inside it.

    Raises: ConfigError: fsspec, or its package for this kind of store, is not installed.
    """
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        kind = url.partition("://")[0]
        package = {"s3": " s3fs", "gs": " gcsfs", "gcs": " gcsfs", "abfs": " adlfs"}.get(kind, "")
        raise ConfigError(f"{url}: {error}; `pip install fsspec{package}`") from None
    except ValueError as error:
        raise ConfigError(f"{url}: {error}") from None


def find_inputs(paths: Sequence[Path | str]) -> list[InputFile]:
    """List the corpus files under `paths`, sorted by name.

    The name is relative to the folder given, or the base name of a file given. Equal names from several
    inputs get `#2`, `#3` in the order given.

    Raises: DataError: a path is missing, holds no corpus file, has another suffix or is given twice.
    """
    inputs: dict[str, InputFile] = {}
    seen: set[str] = set()
    for root in paths:
        for identity, item in _list_url(str(root)) if is_url(root) else _list_local(Path(root)):
            if identity in seen:
                raise DataError(f"--input names {item.path} twice; name every file once")
            seen.add(identity)
            name, count = item.name, 1
            while name in inputs:
                count += 1
                name = f"{item.name}#{count}"
            folder = item.name.partition("/")[0] if "/" in item.name else item.folder
            inputs[name] = InputFile(name, item.path, item.size_bytes, item.version, folder)
    return [inputs[name] for name in sorted(inputs)]


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
    """Open the stored file itself."""
    if not is_url(item.path):
        return open(item.path, "rb", buffering=buffering)
    system, path = file_system(item.path)
    return system.open(path, "rb")


def hash_input(item: InputFile) -> str:
    """Return the xxh3_128 of a file of the corpus."""
    whole = dataclasses.replace(item, start_bytes=0, piece_bytes=None, xxh3_128="")
    with open_input(whole) as reader:
        return reader.finish()


def decompressed(item: InputFile, reader: HashingReader) -> IO[bytes]:
    """Return the text of a .jsonl file, decompressed by its suffix."""
    if item.path.endswith(".gz"):
        return cast(IO[bytes], io.BufferedReader(gzip.GzipFile(fileobj=reader), 1 << 16))
    if item.path.endswith(".zst"):
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


def _list_local(root: Path) -> Iterator[tuple[str, InputFile]]:
    if not root.exists():
        raise DataError(f"--input {root} does not exist; give existing files or folders")
    if root.is_dir():
        paths = sorted(path for path in root.rglob("*") if path.name.endswith(SUFFIXES))
        _require_some(paths, root)
    else:
        _require_suffix(root)
        paths = [root]
    for path in paths:
        name = path.relative_to(root).as_posix() if path != root else path.name
        state = path.stat()
        folder = root.resolve().name if path != root else path.resolve().parent.name
        item = InputFile(name, str(path), state.st_size, str(state.st_mtime_ns), folder)
        yield str(path.resolve()), item


def _list_url(root: str) -> Iterator[tuple[str, InputFile]]:
    system, top = file_system(root)
    top = top.rstrip("/")
    if not system.exists(top):
        raise DataError(f"--input {root} does not exist; give existing files or folders")
    if system.isdir(top):
        found = system.find(top, detail=True)
        details = [found[path] for path in sorted(found) if path.endswith(SUFFIXES)]
        _require_some(details, root)
    else:
        _require_suffix(root)
        details = [system.info(top)]
    for detail in details:
        path = detail["name"]
        # A store without a tag or a time still has the size: changes of content alone are not detected.
        version = detail.get("ETag") or detail.get("mtime") or detail.get("LastModified") or ""
        name = path.removeprefix(top).lstrip("/") or path.rpartition("/")[2]
        folder = top.rpartition("/")[2] if path != top else top.split("/")[-2]
        url = system.unstrip_protocol(path)
        yield url, InputFile(name, url, int(detail["size"]), str(version), folder)


def _require_some(found: Sequence[object], root: Path | str) -> None:
    if not found:
        raise DataError(f"--input {root} holds no corpus file ({', '.join(SUFFIXES)})")


def _require_suffix(root: Path | str) -> None:
    if not str(root).endswith(SUFFIXES):
        raise DataError(f"--input {root} has an unsupported suffix; use {', '.join(SUFFIXES)}")
