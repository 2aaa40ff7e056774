"""From files of a corpus to documents: find the inputs, read their lines, check each record.

Reading gives batches of raw lines so that one process can read while others parse and tokenize; a
batch knows its file and line numbers, so every error names `file:line`.
"""

import gzip
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import orjson

from megatron_long.errors import ConfigError, DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
DEFAULT_SOURCE_KEY = "meta.redpajama_set_name"
DEFAULT_TEXT_KEY = "text"

Progress = Callable[[int], object]
"""Called with the bytes of input read since the last call."""

REDPAJAMA_SOURCES = {
    "RedPajamaCommonCrawl": "CommonCrawl",
    "RedPajamaC4": "C4",
    "RedPajamaGithub": "GitHub",
    "RedPajamaWikipedia": "Wikipedia",
    "RedPajamaBook": "Book",
    "RedPajamaArXiv": "ArXiv",
    "RedPajamaStackExchange": "StackExchange",
}


@dataclass(frozen=True)
class Document:
    """One text of the corpus with the source it belongs to."""

    text: str
    source: str


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus."""

    name: str
    """Name in manifest and keys: relative to the `--input` folder, never an absolute path."""
    path: Path
    size_bytes: int


@dataclass(frozen=True)
class RecordKeys:
    """Where a record keeps its text and its source: dotted paths into the JSON object."""

    text: str = DEFAULT_TEXT_KEY
    source: str = DEFAULT_SOURCE_KEY


@dataclass(frozen=True)
class LineBatch:
    """Raw lines of one file, with their numbers (from 1); blank lines are left out."""

    file: int
    """Index of the file among the inputs."""
    name: str
    path: Path
    lines: list[tuple[int, bytes]]


def no_progress(size_bytes: int) -> None:
    """Report nothing."""


def canonical_source(label: str) -> str:
    """Give the name used for a source label.

    >>> canonical_source("RedPajamaGithub"), canonical_source("Patents")
    ('GitHub', 'Patents')
    """
    return REDPAJAMA_SOURCES.get(label, label)


def find_inputs(paths: Sequence[Path]) -> list[InputFile]:
    """List the corpus files under `paths`, sorted by name.

    The name (relative to the folder given, or the base name of a file given) is what document keys
    are made of, so a corpus keeps its sample when it is moved. Equal names from several inputs get
    `#2`, `#3` in the order given.

    Raises: DataError: a path is missing, holds no corpus file, has another suffix or is given twice.
    """
    inputs: dict[str, InputFile] = {}
    seen: set[Path] = set()
    for root in paths:
        for path in _files_under(root):
            if path.resolve() in seen:
                raise DataError(f"--input names {path} twice; name every file once")
            seen.add(path.resolve())
            stem = path.relative_to(root).as_posix() if root.is_dir() else path.name
            name, count = stem, 1
            while name in inputs:
                count += 1
                name = f"{stem}#{count}"
            inputs[name] = InputFile(name, path, path.stat().st_size)
    return [inputs[name] for name in sorted(inputs)]


def read_batches(
    inputs: Iterable[InputFile],
    *,
    batch_bytes: int = 1 << 20,
    on_progress: Progress = no_progress,
) -> Iterator[LineBatch]:
    """Read the inputs in order, as batches of about `batch_bytes` of text.

    Args:
        on_progress: Called with the bytes of the file (compressed, if it is) read since the last call.
    Raises: DataError: a file cannot be read or decompressed.
    """
    for index, item in enumerate(inputs):
        with ExitStack() as stack:
            raw = stack.enter_context(open(item.path, "rb"))
            lines: list[tuple[int, bytes]] = []
            pending_bytes, position = 0, 0
            for number, line in _numbered_lines(item, stack.enter_context(_decompress(item, raw))):
                lines.append((number, line))
                pending_bytes += len(line)
                if pending_bytes >= batch_bytes:
                    yield LineBatch(index, item.name, item.path, lines)
                    lines, pending_bytes = [], 0
                    on_progress(raw.tell() - position)
                    position = raw.tell()
            if lines:
                yield LineBatch(index, item.name, item.path, lines)
            on_progress(item.size_bytes - position)


def parse_documents(batch: LineBatch, keys: RecordKeys) -> list[Document]:
    """Turn the lines of a batch into documents.

    Raises: DataError: a line is not a JSON object or lacks its text or source; names `file:line`.
    """
    return [_parse_line(line, f"{batch.path}:{number}", keys) for number, line in batch.lines]


def _parse_line(line: bytes, where: str, keys: RecordKeys) -> Document:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON ({error}); every line must be one JSON object with a text and a "
            "source; mend or delete the line"
        ) from None
    text = _look_up(record, keys.text)
    if not isinstance(text, str):
        raise DataError(_lacks(where, record, "text", "--text-key", keys.text))
    source = _look_up(record, keys.source)
    if not isinstance(source, str) or not source:
        raise DataError(_lacks(where, record, "source", "--source-key", keys.source))
    return Document(text, canonical_source(source))


def _look_up(record: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def _lacks(where: str, record: Any, what: str, flag: str, key: str) -> str:
    found = f"its keys are {', '.join(record)}" if isinstance(record, dict) else "it is no object"
    return (
        f"{where} has no {what} string at {key!r} ({found}); mend the line, or name the key with "
        f"{flag} (dots go into nested objects)"
    )


def _files_under(root: Path) -> list[Path]:
    if not root.exists():
        raise DataError(f"--input {root} does not exist; give existing files or folders")
    if root.is_dir():
        files = sorted(path for path in root.rglob("*") if path.name.endswith(SUFFIXES))
        if not files:
            raise DataError(f"--input {root} holds no corpus file ({', '.join(SUFFIXES)})")
        return files
    if not root.name.endswith(SUFFIXES):
        raise DataError(f"--input {root} has a suffix that is not read; use {', '.join(SUFFIXES)}")
    return [root]


def _decompress(item: InputFile, raw: IO[bytes]) -> IO[bytes]:
    if item.path.name.endswith(".gz"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if item.path.name.endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise ConfigError(f"{item.path}: reading .zst needs `pip install zstandard`") from None
        stream = _ZstandardStream(raw, zstandard.ZstdDecompressor().decompressobj)
        return cast(IO[bytes], io.BufferedReader(stream, 1 << 20))
    return raw


class _ZstandardStream(io.RawIOBase):
    """Decompresses frame after frame; zstandard's own reader takes a file that is cut off for whole."""

    def __init__(self, raw: IO[bytes], new_frame: Callable[[], Any]) -> None:
        self._raw, self._new_frame = raw, new_frame
        self._frame: Any = None
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            block = self._raw.read(1 << 18)
            if not block:
                if self._frame is not None:
                    raise EOFError("it ends inside a compressed frame")
                return 0
            self._pending = memoryview(self._decompress(block))
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


def _numbered_lines(item: InputFile, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                yield number, line
    except (OSError, EOFError) as error:
        raise _unreadable(item, number, error) from None
    except Exception as error:
        # zlib.error and zstandard.ZstdError derive from Exception; the latter's module is optional.
        if type(error).__module__.partition(".")[0] not in ("zlib", "zstandard"):
            raise
        raise _unreadable(item, number, error) from None


def _unreadable(item: InputFile, number: int, error: BaseException) -> DataError:
    return DataError(
        f"{os.fspath(item.path)}:{number + 1} cannot be read ({error or type(error).__name__}): the "
        "file is cut off or damaged; fetch it again"
    )
