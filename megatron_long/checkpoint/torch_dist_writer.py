"""Writing Megatron's `torch_dist` folders one piece at a time: see `torch_dist` for the format.

Megatron's own writer gathers the whole model first and needs a process group and CUDA; DCP's planners
support what is needed here, tensors that are created when they are written. DCP's
own file writer keeps some of what it has written, and drops the errors of its threads.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    DEFAULT_SUFFIX,
    SerializationFormat,
    _StorageWriterTransforms,
    _write_item,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_long.checkpoint.direct_io import FileWriter
from megatron_long.checkpoint.torch_dist import FORMAT, FORMAT_FILE
from megatron_long.errors import DataError
from megatron_long.hashing import FileInfo


@dataclass(frozen=True, kw_only=True)
class LazyPiece:
    """A part of a stored tensor that `make` creates."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """Returns the tensor, which is freed when it is written."""


class _LazySavePlanner(DefaultSavePlanner):
    """Plans from shapes only and requests each tensor when it is written."""

    def __init__(self, pieces: Sequence[LazyPiece], objects: Mapping[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._objects = objects
        self._pieces = {MetadataIndex(p.key, torch.Size(p.offset)): p for p in pieces}

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self._objects
        ]
        items += [
            WriteItem(
                index=index,
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(
                        offsets=torch.Size(piece.offset), sizes=torch.Size(piece.shape)
                    ),
                    properties=TensorProperties(dtype=piece.dtype),
                    size=torch.Size(piece.global_shape),
                ),
            )
            for index, piece in self._pieces.items()
        ]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            # Megatron stores a list: an object for each shard that a rank holds.
            torch.save([self._objects[write_item.index.fqn]], stream)
            return stream
        piece = self._pieces[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        tensor = piece.make()
        assert tensor.shape == piece.shape, (piece.key, tensor.shape, piece.shape)
        assert tensor.dtype == piece.dtype, (piece.key, tensor.dtype, piece.dtype)
        return tensor


class _StreamedWriter(dcp.FileSystemWriter):
    """Writes all pieces into one file, each as soon as it is available."""

    written: dict[str, FileInfo]
    """Size and hash of the written files, by name."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        assert plan.storage_data is not None
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        transforms, form = _StorageWriterTransforms(), SerializationFormat.TORCH_SAVE
        results = []
        with FileWriter(Path(self.path) / name) as file:
            stream: Any = file  # it has what torch calls of a stream
            for item in plan.items:
                data = planner.resolve_data(item)
                data = _alone(data) if isinstance(data, Tensor) else data
                results.append(_write_item(transforms, stream, data, item, name, form))
                file.raise_error()
        self.written = {name: file.info}
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _alone(tensor: Tensor) -> Tensor:
    """Return the tensor in a storage of its own, because torch saves whole storages."""
    tensor = tensor.detach().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()


def write_torch_dist(
    folder: Path, pieces: Sequence[LazyPiece], objects: Mapping[str, Any]
) -> dict[str, FileInfo]:
    """Write a `torch_dist` folder.

    Args:
        folder: The folder to fill; created if missing.
        pieces: The tensors; together they must cover each global shape exactly.
        objects: Picklable objects by their full key, including `common_state/shard_0_1`.
    Returns: Size and hash of the files that hold the tensors, by name; the others are small.
    Raises: DataError: writing fails. What a piece's `make` raises comes through.
    """
    writer = _StreamedWriter(folder)
    planner = _LazySavePlanner(pieces, objects)
    with warnings.catch_warnings():  # the absence of a process group is intended
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:
            _raise_cause(error, folder)
    (folder / FORMAT_FILE).write_text(json.dumps(FORMAT), encoding="utf-8")
    return writer.written


def _raise_cause(error: CheckpointException, folder: Path) -> NoReturn:
    cause = next(iter(error.failures.values()))[0]
    if isinstance(cause, OSError):
        raise DataError(f"{folder} cannot be written: {cause}; free some space") from cause
    raise cause
