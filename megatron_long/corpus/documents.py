"""Documents from a file of the corpus: lines of JSON or rows of a table, each validated.

Documents are read in batches and record their line (or row), so every error names `file:line`. A document
that cannot be read ends the run, or is skipped and listed, depending on `BadDocuments`.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote

import orjson

from megatron_long.corpus.columnar import read_rows
from megatron_long.corpus.inputs import (
    BYTE_ORDER_MARK,
    TABLES,
    HashingReader,
    InputFile,
    decompressed,
    open_input,
    suffix_of,
)
from megatron_long.errors import DataError

LONGEST_SOURCE_BYTES = 200
"""Limit of a source's name in file names: file systems allow 255 bytes, including temporary suffixes."""
DEFAULT_SOURCE_KEYS = ("meta.redpajama_set_name", "source")
SOURCE_FROM_FOLDER = "folder"
DEFAULT_TEXT_KEY = "text"
BATCH_BYTES = 4 << 20
MAX_LISTED_PER_FILE = 20

REDPAJAMA_SOURCES = {
    "RedPajamaCommonCrawl": "CommonCrawl",
    "RedPajamaC4": "C4",
    "RedPajamaGithub": "GitHub",
    "RedPajamaWikipedia": "Wikipedia",
    "RedPajamaBook": "Book",
    "RedPajamaArXiv": "ArXiv",
    "RedPajamaStackExchange": "StackExchange",
}


class Document(NamedTuple):
    """One text of the corpus with its source; a tuple, because a corpus has billions of them."""

    text: str
    source: str
    line: int = 0
    """Its line, or its row in a .parquet or .arrow file, from 1."""


@dataclass(frozen=True)
class RecordKeys:
    """Where a record has its text and its source: dotted paths into the JSON object."""

    text: str = DEFAULT_TEXT_KEY
    source: tuple[str, ...] | str = DEFAULT_SOURCE_KEYS
    """Paths to try in order, or `folder`: the folder of the file is its label."""

    @functools.cached_property
    def source_paths(self) -> tuple[str, ...]:
        """Return the paths to try; none when the folder is the label."""
        if self.source == SOURCE_FROM_FOLDER:
            return ()
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)

    @functools.cached_property
    def text_parts(self) -> list[str]:
        """Return the path of the text, part by part."""
        return self.text.split(".")

    @functools.cached_property
    def source_parts(self) -> list[list[str]]:
        """Return the paths to try, part by part."""
        return [path.split(".") for path in self.source_paths]


@dataclass
class BadDocuments:
    """What to do with documents that cannot be read, and the documents skipped so far."""

    skip: bool = False
    count: int = 0
    listed: list[dict[str, Any]] = field(default_factory=list)
    """`file`, `line` and `reason` of the first ones."""

    def add(self, item: InputFile, line: int, reason: str, remedy: str) -> None:
        """Note a bad document.

        Raises: DataError: they are not to be skipped.
        """
        if not self.skip:
            raise DataError(
                f"{item.path}:{line} {reason}; {remedy}, or skip such documents with "
                "--on-bad-document skip"
            )
        self.count += 1
        if len(self.listed) < MAX_LISTED_PER_FILE:
            self.listed.append({"file": item.name, "line": line, "reason": reason})


@dataclass
class FileState:
    """How far a file has been read."""

    position_bytes: int = 0
    """Bytes of the stored file (compressed, if it is) that were read."""
    xxh3_128: str = ""
    """Hash of the stored file, once all of it is read."""
    batch_bytes: int = BATCH_BYTES
    """Approximate text size of a batch."""
    used_bytes: int = 0
    """Bytes of text (including JSON) returned so far."""


def canonical_source(label: str) -> str:
    """Return the name used for a source label.

    >>> canonical_source("RedPajamaGithub"), canonical_source("Patents")
    ('GitHub', 'Patents')
    """
    return REDPAJAMA_SOURCES.get(label, label)


def read_documents(
    item: InputFile, keys: RecordKeys, bad: BadDocuments, state: FileState
) -> Iterator[list[Document]]:
    """Read the documents of one file in batches of about BATCH_BYTES of text.

    Args:
        state: Updated while reading.
    Raises: DataError: the file is damaged, or a document is bad and not to be skipped.
    """
    with open_input(item) as reader:
        is_table = suffix_of(item.path) in TABLES
        read = _read_table if is_table else _read_lines
        for batch in read(item, reader, keys, bad, state):
            share = min(reader.used_share(state.used_bytes), 1.0) / item.share[1]
            state.position_bytes = min(round(reader.position * share), item.read_bytes)
            yield batch
        state.position_bytes = item.read_bytes
        if item.xxh3_128 or not is_table:  # which is not read from end to end
            state.xxh3_128 = reader.finish()


def parse_line(line: bytes, item: InputFile, number: int, keys: RecordKeys) -> Document:
    """Turn a line into a document.

    Raises: ValueError: it is bad; the arguments are the reason and the remedy.
    """
    try:
        record = orjson.loads(line.removeprefix(BYTE_ORDER_MARK))
    except orjson.JSONDecodeError as error:
        raise ValueError(
            f"is not JSON ({error}): every line must be one JSON object with a text and a source",
            "fix or delete the line",
        ) from None
    label = canonical_source(item.folder) if not keys.source_paths else None
    return _document(record, number, keys, label)


def _document(record: Any, line: int, keys: RecordKeys, label: str | None) -> Document:
    text = _look_up(record, keys.text_parts)
    if not isinstance(text, str):
        raise ValueError(*_lacks(record, text, "text", "--text-key", keys.text))
    if label is None:
        source = None
        for parts in keys.source_parts:
            source = _look_up(record, parts)
            if source is not None:
                break
        if not isinstance(source, str) or not source:
            raise ValueError(
                *_lacks(record, source, "source", "--source-key", " or ".join(keys.source_paths))
            )
        label = canonical_source(source)
    _check_label(label)
    return Document(text, label, line)


@functools.lru_cache(1024)
def _check_label(label: str) -> None:
    """Refuse a source whose name is too long for a file of held-out documents; cached, as sources are few."""
    length = len(quote(label, safe=" "))
    if length > LONGEST_SOURCE_BYTES:
        raise ValueError(
            f"has a source label too long for a file name ({label[:20]!r}... has {length} bytes: "
            f"at most {LONGEST_SOURCE_BYTES})",
            "give it a shorter label, or name another key with --source-key",
        )


def _look_up(record: Any, parts: list[str]) -> Any:
    for part in parts:
        if type(record) is str:  # parquet files sometimes store `meta` as JSON
            try:
                record = orjson.loads(record)
            except orjson.JSONDecodeError:
                return None
        if type(record) is not dict:
            return None
        record = record.get(part)
    return record


def _lacks(record: Any, value: Any, what: str, flag: str, key: str) -> tuple[str, str]:
    found = (
        f"its keys are {', '.join(record)}" if isinstance(record, dict) else "it is not an object"
    )
    if isinstance(record, dict) and key in record and value is None:
        found = "it is null"
    elif value is not None:
        found = "it is empty" if value == "" else f"it is of type {type(value).__name__}"
    folder = ", or give --source-from-folder if each source has a folder" * (what == "source")
    return (
        f"has no {what} string at {key!r} ({found})",
        f"fix the line, or name the key with {flag} (dots select keys of nested objects){folder}",
    )


def _read_lines(
    item: InputFile,
    reader: HashingReader,
    keys: RecordKeys,
    bad: BadDocuments,
    state: FileState,
) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size_bytes, number, is_shared = 0, item.first_line - 1, item.share[1] > 1
    try:
        for number, line in enumerate(decompressed(item, reader), item.first_line):
            begins, state.used_bytes = state.used_bytes, state.used_bytes + len(line)
            if (is_shared and not item.owns(begins)) or line.isspace():
                continue
            try:
                batch.append(parse_line(line, item, number, keys))
            except ValueError as error:
                bad.add(item, number, *error.args)
            size_bytes += len(line)
            if size_bytes >= state.batch_bytes:
                yield batch
                batch, size_bytes = [], 0
    except Exception as error:
        _require_damage(error, item)
        reason = f"cannot be read ({error or type(error).__name__}): the file is cut off or damaged"
        if item.owns(state.used_bytes):
            bad.add(item, number + 1, reason, "fetch it again")
    yield batch


def _require_damage(error: Exception, item: InputFile) -> None:
    """Raise what is not damage of the file: skipping the rest when a disk fails would lose documents."""
    if isinstance(error, OSError) and error.errno:
        raise DataError(
            f"{item.path}: reading fails ({error}); when it works, the same command resumes where it was"
        ) from error
    # zlib.error and zstandard.ZstdError derive from Exception; pyarrow's from ValueError and OSError.
    package = type(error).__module__.partition(".")[0]
    if not (isinstance(error, OSError | EOFError) or package in ("zlib", "zstandard", "pyarrow")):
        raise error


def _read_table(
    item: InputFile,
    reader: HashingReader,
    keys: RecordKeys,
    bad: BadDocuments,
    state: FileState,
) -> Iterator[list[Document]]:
    label = canonical_source(item.folder) if not keys.source_paths else None
    number = item.first_line - 1
    columns = {key.partition(".")[0] for key in (keys.text, *keys.source_paths)}
    try:
        # pyarrow seeks, so it opens the file itself.
        for records, position in read_rows(item, columns, state.batch_bytes):
            batch: list[Document] = []
            for record in records:
                number += 1
                if not item.owns_row(number):
                    continue
                try:
                    if isinstance(record, UnicodeDecodeError):
                        raise ValueError(f"is not UTF-8 ({record})", "fix or delete the row")
                    batch.append(_document(record, number, keys, label))
                except ValueError as error:
                    bad.add(item, number, *error.args)
            reader.position = position - item.start_bytes
            if batch:
                yield batch
    except Exception as error:
        _require_damage(error, item)
        reason = f"cannot be read ({error}): the file is cut off or damaged"
        if item.owns_row(number + 1):
            bad.add(item, number + 1, reason, "fetch it again")
