"""Megatron's indexed dataset (`.bin` of tokens, `.idx` of documents), written and read only with numpy.

Layout of `.idx`, little-endian: magic, version u64, dtype code u8, sequence count u64, document count
u64 (documents + 1), lengths i32, byte pointers i64, document indices i64. Each document is one sequence.
"""

import bisect
import struct
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_long.errors import DataError
from megatron_long.files import atomic_path

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[np.dtype, int] = {np.dtype("<i4"): 4, np.dtype("<u2"): 8}
MAX_LENGTH = 2**31 - 1


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype in which Megatron stores a vocabulary: two bytes if they are enough.

    >>> str(token_dtype(32000)), str(token_dtype(128256))
    ('uint16', 'int32')

    Source: megatron-core 0.19.2, datasets/indexed_dataset.py, `DType.optimal_dtype`.
    """
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def bin_path(prefix: Path) -> Path:
    """Return the token file of a prefix: `.bin` is appended, dots in the name stay."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Return the index file of a prefix: `.idx` is appended, dots in the name stay."""
    return prefix.with_name(prefix.name + ".idx")


def write_index(
    path: Path, dtype: DTypeLike, count: int, lengths: Callable[[], Iterable[NDArray]]
) -> None:
    """Write an .idx file, holding a part of it in memory at a time.

    Args:
        dtype: Of the tokens.
        count: Number of documents.
        lengths: Returns the lengths of all documents in parts; it is called twice.
    """
    dtype = np.dtype(dtype)
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, DTYPE_CODES[dtype], count, count + 1))
        for part in lengths():
            file.write(part.astype("<i4").tobytes())
        before = 0
        for part in lengths():
            ends = before + np.cumsum(part, dtype="<i8") * dtype.itemsize
            file.write(np.concatenate([np.array([before], "<i8"), ends])[:-1].tobytes())
            before = int(ends[-1]) if len(ends) else before
        for start in range(0, count + 1, 1 << 18):
            file.write(np.arange(start, min(start + (1 << 18), count + 1), dtype="<i8").tobytes())


class IndexedDatasetWriter:
    """Write documents one after another; `finalize` moves the two complete files into place.

    Use it in a `with` block: an exception removes what was written so far.
    """

    def __init__(self, prefix: Path, dtype: DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self._lengths: list[int] = []
        self._stack = ExitStack()
        # Left in reverse order: the .bin is in place before the .idx that makes it readable.
        self._idx = self._stack.enter_context(atomic_path(idx_path(prefix)))
        self._bin = self._stack.enter_context(atomic_path(bin_path(prefix)))
        file = open(self._bin, "wb", buffering=1 << 20)  # noqa: SIM115, the stack closes it
        self._file = self._stack.enter_context(file)

    def add_document(self, tokens: NDArray) -> None:
        """Append one document."""
        if len(tokens) > MAX_LENGTH:
            raise DataError(
                f"a document of {len(tokens):,} tokens; the format's limit is {MAX_LENGTH:,}"
            )
        self._file.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.append(len(tokens))

    def finalize(self) -> None:
        """Write the index and put both files in place."""
        lengths = np.array(self._lengths, dtype="<i4")
        write_index(self._idx, self.dtype, len(lengths), lambda: [lengths])
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)


class IndexedDatasetReader:
    """Read an indexed dataset through memory maps; opening reads only the header.

    Raises: DataError: a file is missing, is not an index, or the two do not match.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        idx, tokens_file = idx_path(self.prefix), bin_path(self.prefix)
        for path in (idx, tokens_file):
            if not path.is_file():
                raise DataError(
                    f"{path} does not exist; a dataset is a pair of .bin and .idx files"
                )
        with open(idx, "rb") as file:
            header = file.read(HEADER.size)
        count = self._read_header(idx, header)
        offset = HEADER.size
        self.lengths: NDArray[np.int32] = _map(idx, "<i4", offset, count)
        self._pointers: NDArray[np.int64] = _map(idx, "<i8", offset + 4 * count, count)
        size_bytes = tokens_file.stat().st_size
        expected = (
            int(self._pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if count else 0
        )
        if size_bytes != expected:
            raise DataError(
                f"{tokens_file} has {size_bytes:,} bytes, but {idx} describes {expected:,}; one of them "
                "is cut off or from another dataset: copy or make the dataset again"
            )
        self.num_tokens = size_bytes // self.dtype.itemsize
        self._tokens: NDArray = _map(tokens_file, self.dtype, 0, self.num_tokens)

    def _read_header(self, idx: Path, header: bytes) -> int:
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise DataError(f"{idx} is not a Megatron dataset index (its first bytes are wrong)")
        _, version, code, count, num_indices = HEADER.unpack(header)
        dtypes = {code: dtype for dtype, code in DTYPE_CODES.items()}
        if version != VERSION or code not in dtypes:
            raise DataError(
                f"{idx} has version {version} and token type {code}; version {VERSION} with types "
                f"{sorted(dtypes)} is read"
            )
        self.dtype = dtypes[code]
        if idx.stat().st_size < HEADER.size + 12 * count + 8 * num_indices:
            raise DataError(f"{idx} is cut off; copy or make the dataset again")
        return count

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, index: int) -> NDArray:
        """Return the tokens of document `index`, a view into the file."""
        start = int(self._pointers[index]) // self.dtype.itemsize
        return self._tokens[start : start + int(self.lengths[index])]

    def read_span(self, start_token: int, count: int) -> NDArray:
        """Return `count` tokens from `start_token` of the concatenated documents."""
        return self._tokens[start_token : start_token + count]

    def document_starts(self, start_token: int, count: int) -> NDArray[np.int64]:
        """Return the positions at which documents begin inside a span, relative to it.

        The first element is always 0: the beginning of the span, inside a document or not.
        """
        size = self.dtype.itemsize
        # bisect, not np.searchsorted: the latter would copy the whole unaligned array.
        first = bisect.bisect_right(self._pointers, start_token * size)
        last = bisect.bisect_left(self._pointers, (start_token + count) * size, lo=first)
        inside = np.asarray(self._pointers[first:last], dtype=np.int64) // size - start_token
        return np.concatenate([np.zeros(1, np.int64), inside])

    def documents_between(self, start_token: int, count: int) -> tuple[int, int]:
        """Return the first document that has a token in a span, and one past the last."""
        size = self.dtype.itemsize
        first = max(bisect.bisect_right(self._pointers, start_token * size) - 1, 0)
        return first, bisect.bisect_left(self._pointers, (start_token + count) * size, lo=first)

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        # Data loader processes reopen the files; a pickled memory map would contain the data.
        return type(self), (self.prefix,)


def _map(path: Path, dtype: DTypeLike, offset: int, count: int) -> NDArray:
    if count == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))
