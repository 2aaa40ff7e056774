"""Large files read and written bypassing the page cache, and hashed while they are written.

A conversion touches every byte once. The cache would copy each byte once more into pages that the
system first has to allocate, which on a virtual machine takes longer than the disk; here a few blocks of
memory are reused. If a file system does not support direct access, the cache is used.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import xxhash

from megatron_long.hashing import FileInfo

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 4096
"""Alignment of offsets, sizes and memory; no disk requires more."""
BLOCK_BYTES = 2**24
NUM_BLOCKS = 4
"""Maximum number of blocks of a file that wait to be written."""
_DIRECT = getattr(os, "O_DIRECT", 0)


def read_bytes(path: Path, offset: int, size_bytes: int, *, use_cache: bool = False) -> Tensor:
    """Return a part of a file as uint8, in its own memory.

    Args:
        path: The file.
        offset: Where the part begins, in bytes.
        size_bytes: Its size.
        use_cache: Whether to read through the system's page cache, for files that were just read.
    Raises: OSError: the file cannot be read, or is too short.
    """
    import torch

    if not size_bytes:
        return torch.empty(0, dtype=torch.uint8)
    skipped = offset % ALIGNMENT
    wanted = skipped + size_bytes
    room = -(-wanted // ALIGNMENT) * ALIGNMENT
    memory = torch.empty(room + ALIGNMENT, dtype=torch.uint8)
    view = memoryview(memory.numpy())[-memory.data_ptr() % ALIGNMENT :][:room]
    done = 0
    with _opened(path, os.O_RDONLY) as file:
        if use_cache:
            _use_cache(file)
        while done < wanted:
            block = view[done : done + BLOCK_BYTES]
            count = _transfer(file, os.preadv, [block], offset - skipped + done)
            if not count:
                raise OSError(f"{path} is {wanted - done} bytes too short")
            done += count
    # A storage of exactly the tensor's size, because torch saves whole storages.
    return torch.frombuffer(view[skipped:wanted], dtype=torch.uint8)


class FileWriter:
    """A new file; a thread writes the data passed to `write`, in order.

    A disk error is kept until `raise_error` or the end of the `with` block: raising it inside
    torch's saving would hide it behind torch's own error.

    Args:
        sync: Whether the data is on the disk at the end of the `with` block.
    """

    def __init__(self, path: Path, *, sync: bool = False) -> None:
        self._sync = sync
        self._file = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[tuple[Future[None], mmap.mmap]] = deque()
        self._block = mmap.mmap(-1, BLOCK_BYTES)
        self._filled = self._handed_over = 0
        self._hash = xxhash.xxh3_128()
        self._error: OSError | None = None

    def tell(self) -> int:
        """Return the number of bytes so far."""
        return self._handed_over + self._filled

    def write(self, data: Any) -> int:
        """Write bytes, or any object with a buffer; the caller may change it afterwards."""
        rest = memoryview(data).cast("B")
        length = len(rest)
        while rest:
            part = rest[: BLOCK_BYTES - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            rest = rest[len(part) :]
            if self._filled == BLOCK_BYTES:
                self._hand_over()
        return length

    def flush(self) -> None:
        """Do nothing: only whole blocks are written before the end."""

    def raise_error(self) -> None:
        """Raise the disk error, if there is one."""
        if self._error is not None:
            raise self._error

    @property
    def info(self) -> FileInfo:
        """Size and hash; after the `with` block."""
        return FileInfo(self.tell(), self._hash.hexdigest())

    def _hand_over(self) -> None:
        block, count, start = self._block, self._filled, self._handed_over
        self._pending.append((self._thread.submit(self._put, block, count, start), block))
        if len(self._pending) < NUM_BLOCKS:
            self._block = mmap.mmap(-1, BLOCK_BYTES)
        else:
            done, self._block = self._pending.popleft()
            done.result()
        self._handed_over += count
        self._filled = 0

    def _put(self, block: mmap.mmap, count: int, start: int) -> None:
        if self._error is not None:
            return
        view = memoryview(block)[:count]
        self._hash.update(view)
        try:
            if count % ALIGNMENT:
                _use_cache(self._file)
            while view:
                written = _transfer(self._file, os.pwrite, view, start)
                view, start = view[written:], start + written
        except OSError as error:
            self._error = error.with_traceback(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._hand_over()
            if self._sync:
                self._pending.append((self._thread.submit(self._flush_to_disk), self._block))
        self._thread.shutdown(cancel_futures=kind is not None)
        os.close(self._file)
        if kind is None:
            for done, _block in self._pending:
                done.result()
            self.raise_error()

    def _flush_to_disk(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            self._error = self._error or error.with_traceback(None)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    file = _open(path, flags)
    try:
        yield file
    finally:
        os.close(file)


def _transfer(file: int, call: Callable[..., int], *args: Any) -> int:
    """Read or write; switches to the page cache if the file system requires it."""
    try:
        return call(file, *args)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _use_cache(file)
        return call(file, *args)


def _use_cache(file: int) -> None:
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~_DIRECT)
