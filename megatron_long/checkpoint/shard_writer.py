"""Shards of a checkpoint in training: staged in host memory by several threads, hashed while written.

Megatron-Core 0.19.2's writer stages a rank's tensors with one thread, which is as slow as the system provides
pages (22 s for 31.8 GB, 2 x H200; training waits), does so even if training waits for the whole save, writes
a rank's files one after another, and leaves them to be read again for their hashes. The files are the same.
"""

from __future__ import annotations

import io
import mmap
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import (
    SerializationFormat,
    _StorageWriterTransforms,
    _write_item,
)
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_long.checkpoint.direct_io import FileWriter
from megatron_long.checkpoint.hashes import leave_shard_hashes
from megatron_long.hashing import FileInfo

type Objects = list[tuple[WriteItem, io.BytesIO]]
type Tensors = list[tuple[WriteItem, Tensor]]
type Bucket = tuple[str, str, tuple[Objects, Tensors]]
"""One file, as Megatron's `FileSystemWriterAsync` plans it: its path, its name, and what belongs into it."""

STAGING_THREADS = 8
"""Of each rank: new pages come from the system at the speed of one core for each thread."""
BLOCK_BYTES = 2**25
"""Of pinned memory, for each thread."""
SMALL_BYTES = 2**20
"""Tensors below are copied by torch."""


def stage(buckets: Sequence[Bucket]) -> list[Bucket]:
    """Copy the tensors on GPUs to host memory, which is freed when they are; training may continue then."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # the threads below have streams of their own
    with ThreadPoolExecutor(STAGING_THREADS) as pool:
        copies: list[list[Future[Tensor]]] = [
            [pool.submit(to_host, tensor) for _, tensor in tensors] for *_, (_, tensors) in buckets
        ]
        return [
            (
                path,
                name,
                (objects, [(i, c.result()) for (i, _), c in zip(tensors, own, strict=True)]),
            )
            for (path, name, (objects, tensors)), own in zip(buckets, copies, strict=True)
        ]


def leave(buckets: Sequence[Bucket]) -> list[Bucket]:
    """Stage nothing: training waits, and each tensor is copied when it is written."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return list(buckets)


def write_shards(
    transforms: _StorageWriterTransforms | None,
    rank: int,
    buckets: Sequence[Bucket],
    results_queue: Any,
) -> Exception | None:
    """Write the files of a rank concurrently, and leave their sizes and hashes for `take_shard_hashes`.

    Args:
        transforms: The writer's; without them torch's defaults, which change nothing.
        rank: The process whose files these are, not necessarily this one.
        buckets: Its files; tensors are on the host or on the GPU.
        results_queue: Receives what torch's finish expects of each file, by number, or the error.
    Returns: The error, whatever it is: an exception would end the process that writes in the background.
    """
    try:
        with ThreadPoolExecutor(max(1, len(buckets))) as pool:
            written = list(pool.map(partial(_write_shard, transforms), buckets))
        infos = {bucket[1]: info for bucket, (_, info) in zip(buckets, written, strict=True)}
        leave_shard_hashes(Path(buckets[0][0]).parent, rank, infos)
    except Exception as error:
        results_queue.put(error.with_traceback(None))
        return error
    results_queue.put({number: results for number, (results, _) in enumerate(written)})
    return None


def _write_shard(
    transforms: _StorageWriterTransforms | None, bucket: Bucket
) -> tuple[list[WriteResult], FileInfo]:
    path, name, (objects, tensors) = bucket
    transforms = transforms or _StorageWriterTransforms()
    memory = HostMemory()
    results = []
    with FileWriter(Path(path), sync=True) as file:
        stream: Any = file  # it has what torch calls of a stream
        write = partial(_write_item, transforms, stream)
        for item, content in objects:
            results.append(write(content, item, name, SerializationFormat.TORCH_SAVE))
            file.raise_error()
        for item, tensor in tensors:
            held = to_host(tensor, memory)
            results.append(write(held, item, name, SerializationFormat.TORCH_SAVE))
            file.raise_error()
    return results, file.info


class HostMemory:
    """Memory for one tensor after another: its pages are requested from the system once."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def like(self, tensor: Tensor) -> Tensor:
        """An uninitialized tensor of its shape on the host, valid until the next one.

        Its storage has the tensor's size, because torch saves whole storages.
        """
        if len(self._memory) < tensor.nbytes:
            self._memory = mmap.mmap(-1, tensor.nbytes)
        part = memoryview(self._memory)[: tensor.nbytes]
        return torch.frombuffer(part, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)


_thread = threading.local()


def to_host(tensor: Tensor, memory: HostMemory | None = None) -> Tensor:
    """Return the tensor on the host: itself if it is there, or a copy.

    Args:
        memory: Where the copy is made; default: new memory.
    """
    if not tensor.is_cuda:
        return tensor
    if tensor.nbytes < SMALL_BYTES or not tensor.is_contiguous():
        return tensor.to("cpu")
    host = torch.empty_like(tensor, device="cpu") if memory is None else memory.like(tensor)
    with torch.cuda.device(tensor.device):
        if not hasattr(_thread, "stream"):
            _thread.stream = torch.cuda.Stream()
            _thread.block = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(_thread.stream):
            copy_in_blocks(tensor, host, _thread.block)
    return host


def copy_in_blocks(source: Tensor, target: Tensor, block: Tensor) -> None:
    """Copy a contiguous tensor to the host through a block of pinned memory, on the current stream.

    numpy writes the target, because it leaves other threads the interpreter meanwhile.

    Args:
        source: On any device.
        target: Contiguous, on the host, with as many bytes.
        block: uint8.
    """
    raw, into, through = (_bytes_of(tensor) for tensor in (source, target, block))
    for start in range(0, len(raw), len(through)):
        part = raw[start : start + len(through)]
        held = through[: len(part)]
        held.copy_(part, non_blocking=True)
        if source.is_cuda:
            torch.cuda.current_stream().synchronize()
        into.numpy()[start : start + len(part)] = held.numpy()


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)
