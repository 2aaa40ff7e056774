"""Tensors stored in files as plain bytes: each read in one operation into its own memory.

safetensors and torch's saved tensors both hold a tensor's bytes in row order at a known place.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megatron_long.checkpoint.direct_io import read_bytes

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from megatron_long.model.mapping import Unit

STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""safetensors' names of the supported types, and torch's."""
STORED_NAMES = {name: stored for stored, name in STORED_DTYPES.items()}
LOOKAHEAD_BYTES = 2**29
READERS = 2
"""Threads that read; two requests use the disk better than one."""


def read_ahead[Found](
    units: Iterable[Unit], read: Callable[[Unit], Found], size_bytes: Callable[[Unit], int]
) -> Generator[tuple[Unit, Found]]:
    """Yield the result of `read` for each unit, in order, reading the next ones while the caller works.

    Args:
        units: The pieces, in the order in which they are needed.
        read: Called in separate threads; its exceptions are raised in order.
        size_bytes: Size of a unit; at most `LOOKAHEAD_BYTES`, or one unit, are read ahead.
    """
    waiting: deque[tuple[Unit, Future[Found]]] = deque()
    ready_bytes = 0
    threads = ThreadPoolExecutor(READERS)
    try:
        for unit in units:
            while waiting and ready_bytes + size_bytes(unit) > LOOKAHEAD_BYTES:
                ready_bytes -= size_bytes(waiting[0][0])
                yield _take(waiting)
            waiting.append((unit, threads.submit(read, unit)))
            ready_bytes += size_bytes(unit)
        while waiting:
            yield _take(waiting)
    finally:
        threads.shutdown(cancel_futures=True)


def _take[Found](waiting: deque[tuple[Unit, Future[Found]]]) -> tuple[Unit, Found]:
    """Return the oldest; in a separate function, so that nothing here keeps its tensors."""
    unit, future = waiting.popleft()
    return unit, future.result()


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Location of a tensor in a file."""

    path: Path
    offset: int
    """In bytes."""
    shape: tuple[int, ...]
    stored_dtype: str
    """safetensors' name of the type."""
    size_bytes: int

    def tensor(self) -> Tensor:
        """Return the tensor."""
        import torch

        name = STORED_DTYPES.get(self.stored_dtype)
        kind = (
            getattr(torch, name) if name else torch.uint8
        )  # other types are refused before they are used
        flat = _read(self.path, self.offset, self.size_bytes, kind)
        return flat.reshape(self.shape) if name else flat


def _read(
    path: Path, offset: int, size_bytes: int, kind: dtype, *, use_cache: bool = False
) -> Tensor:
    flat = read_bytes(path, offset, size_bytes, use_cache=use_cache)
    if (
        offset % kind.itemsize
    ):  # memory starts like the file, and values must be aligned to their size
        flat = flat.clone()
    return flat.view(kind)


def find_tensors(path: Path, names: Iterable[str]) -> dict[str, StoredTensor]:
    """Return the locations of tensors in a safetensors file, which the library has validated.

    The library gives no offsets, and it reads through memory maps.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found = {}
    for name in names:
        entry = header[name]
        start, end = entry["data_offsets"]
        found[name] = StoredTensor(
            path=path,
            offset=8 + length + start,
            shape=tuple(entry["shape"]),
            stored_dtype=entry["dtype"],
            size_bytes=end - start,
        )
    return found


class _Part(io.RawIOBase):
    """A range of a file that reads as a file of its own."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length = file, offset, length
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        left = max(self._length - self._at, 0)
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(memoryview(buffer)[:left])  # type: ignore[attr-defined]
        self._at += count
        return count


def read_saved_tensor(path: Path, offset: int, length: int, *, check_bytes: bool = False) -> Tensor:
    """Return a tensor that `torch.save` wrote into a part of a file.

    Args:
        path: The file.
        offset: Where the part begins, in bytes.
        length: Its size, in bytes.
        check_bytes: Whether to compare checksums, of the tensor and of its shape, with those stored.
    Raises: ValueError, KeyError, OSError, zipfile.BadZipFile, pickle.UnpicklingError: it is damaged, or
        not a plain tensor.
    """
    import torch

    shell, entry, begin = _find_values(path, offset, length, check_bytes=check_bytes)
    flat = _read(path, begin, entry.file_size, shell.dtype)
    if check_bytes and zlib.crc32(flat.view(torch.uint8).numpy()) != entry.CRC:
        raise ValueError("its checksum is wrong")
    return flat.as_strided(shell.size(), shell.stride(), shell.storage_offset())


def read_saved_box(
    path: Path, offset: int, length: int, start: Sequence[int], sizes: Sequence[int]
) -> Tensor:
    """Return a block of a tensor that `torch.save` wrote; reads only from its first value to its last.

    Reads through the system's page cache: several processes take their blocks of the same files.

    Args:
        path: The file.
        offset: Where the part of the file begins, in bytes.
        length: Its size, in bytes.
        start: First index of the block, by axis.
        sizes: Its size, by axis; none is 0.
    Raises: see `read_saved_tensor`; no checksum is compared.
    """
    shell, entry, begin = _find_values(path, offset, length, check_bytes=False)
    strides = shell.stride()
    first = int(shell.storage_offset()) + sum(
        i * step for i, step in zip(start, strides, strict=True)
    )
    count = 1 + sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))
    width = shell.dtype.itemsize
    if (first + count) * width > entry.file_size:
        raise ValueError(f"{entry.file_size} bytes, and value {first + count - 1} is requested")
    flat = _read(path, begin + first * width, count * width, shell.dtype, use_cache=True)
    return flat.as_strided(tuple(sizes), strides)


def _find_values(
    path: Path, offset: int, length: int, *, check_bytes: bool
) -> tuple[Tensor, zipfile.ZipInfo, int]:
    """Return a saved tensor without values, the entry of its storage, and its offset in the file."""
    import torch

    with path.open("rb") as file:
        part: Any = _Part(file, offset, length)
        shell = torch.load(part, map_location="meta", weights_only=True)
        if not isinstance(shell, torch.Tensor) or type(shell) is not torch.Tensor:
            raise pickle.UnpicklingError(f"a {type(shell).__name__} instead of a tensor")
        part.seek(0)
        with zipfile.ZipFile(part) as archive:
            (entry,) = [i for i in archive.infolist() if i.filename.endswith("/data/0")]
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("compressed")
            for other in archive.infolist() if check_bytes else ():
                if other is not entry:
                    archive.read(other)  # which compares its checksum
            part.seek(entry.header_offset + 26)
            sizes = part.read(4)
    name_and_extra = int.from_bytes(sizes[:2], "little") + int.from_bytes(sizes[2:], "little")
    return shell, entry, offset + entry.header_offset + 30 + name_and_extra
