"""Reading and writing Megatron's `torch_dist` folders one piece at a time, in constant memory.

`torch_dist` is the folder of `torch.distributed.checkpoint` (DCP) with two additions of Megatron's:
`metadata.json`, and the state that is no tensor, pickled as the object `common_state`. Megatron's
own writer gathers the whole model first and wants a process group and CUDA; DCP's planners are made
for what is needed here, tensors that come into being when their turn to be written comes.
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
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_long.errors import DataError

FORMAT_FILE = "metadata.json"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
COMMON_STATE = "common_state/shard_0_1"


@dataclass(frozen=True, kw_only=True)
class LazyPiece:
    """A part of a stored tensor that `make` brings into being."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


class _LazySavePlanner(DefaultSavePlanner):
    """Plans from shapes alone and asks for each tensor when it is written."""

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


def write_torch_dist(folder: Path, pieces: Sequence[LazyPiece], objects: Mapping[str, Any]) -> None:
    """Write a `torch_dist` folder.

    Args:
        folder: The folder to fill; made if missing.
        pieces: The tensors; together they must cover each global shape exactly.
        objects: Picklable things by their full key, `common_state/shard_0_1` among them.
    Raises: DataError: the disk refuses. What a piece's `make` raises comes through.
    """
    # One thread: torch 2.11 drops the exceptions of others, and with them parts of the checkpoint.
    writer = dcp.FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0)
    planner = _LazySavePlanner(pieces, objects)
    with warnings.catch_warnings():  # that there is no process group is meant
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:
            _raise_cause(error, folder)
    (folder / FORMAT_FILE).write_text(json.dumps(FORMAT), encoding="utf-8")


def _raise_cause(error: CheckpointException, folder: Path) -> NoReturn:
    cause = next(iter(error.failures.values()))[0]
    for seen in (cause, cause.__context__):  # torch.save's own complaint hides the disk's
        if isinstance(seen, OSError):
            raise DataError(f"{folder} cannot be written: {seen}; free some space") from cause
    raise cause


class _SlicePlanner(DefaultLoadPlanner):
    """Receives one slice."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._target
        for axis, start in enumerate(read_item.dest_offsets):
            target = target.narrow(axis, start, read_item.lengths[axis])
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class TorchDistReader:
    """The tensors of a `torch_dist` folder, whatever layout they were saved from."""

    def __init__(self, folder: Path) -> None:
        """Read the index.

        Raises: DataError: not such a folder, or a file that the index names is missing or short.
        """
        _check_format(folder)
        self.folder = folder
        self._reader = dcp.FileSystemReader(folder)
        try:
            self._metadata: Metadata = self._reader.read_metadata()
        except Exception as error:  # a damaged pickle raises nearly anything
            raise DataError(
                f"{folder}/.metadata cannot be read ({type(error).__name__}: {error}); "
                "the checkpoint is incomplete or damaged: use another iteration"
            ) from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._check_files()

    def _check_files(self) -> None:
        needed: dict[str, int] = {}
        for stored in (self._metadata.storage_data or {}).values():
            end = stored.offset + stored.length
            needed[stored.relative_path] = max(end, needed.get(stored.relative_path, 0))
        for name, size_bytes in sorted(needed.items()):
            path = self.folder / name
            seen = path.stat().st_size if path.is_file() else -1
            if seen < size_bytes:
                state = "is missing" if seen < 0 else f"has {seen} bytes"
                raise DataError(
                    f"{path} {state}; the checkpoint's index needs {size_bytes} bytes of it: "
                    "copy the checkpoint again or use another iteration"
                )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Give the global shape of every tensor, those of the optimizer among them."""
        return {key: tuple(stored.size) for key, stored in self._tensors()}

    def dtype(self, key: str) -> torch.dtype:
        """Give the type in which a tensor is stored."""
        return dict(self._tensors())[key].properties.dtype

    def _tensors(self) -> list[tuple[str, TensorStorageMetadata]]:
        entries = self._metadata.state_dict_metadata.items()
        return [
            (key, stored) for key, stored in entries if isinstance(stored, TensorStorageMetadata)
        ]

    def read(self, key: str, layer: int | None) -> Tensor:
        """Read a tensor, or one layer (an index of axis 0) of it."""
        stored = self._metadata.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata)
        offset, shape = [0] * len(stored.size), list(stored.size)
        if layer is not None:
            offset[0], shape[0] = layer, 1
        chunk = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(shape))
        target = torch.empty(shape, dtype=stored.properties.dtype)
        items = create_read_items_for_chunk_list(key, stored, [chunk])
        try:
            self._reader.read_data(LoadPlan(items), _SlicePlanner(target)).wait()
        except Exception as error:  # torch.load on damaged bytes raises nearly anything
            raise DataError(
                f"{self.folder}: tensor {key} cannot be read ({type(error).__name__}: {error}); "
                "the checkpoint is damaged: copy it again or use another iteration"
            ) from error
        return target if layer is None else target[0]


def read_common_state(folder: Path) -> dict[str, Any]:
    """Read what a checkpoint holds beside tensors: `args`, `iteration` and so on.

    Raises: DataError: it cannot be read.
    """
    _check_format(folder)
    with (
        warnings.catch_warnings()
    ):  # of the process group, and of packages that reading does not need
        warnings.simplefilter("ignore", UserWarning)
        from megatron.core.dist_checkpointing import load_common_state_dict
        from megatron.core.safe_globals import register_safe_globals

        register_safe_globals()
        try:
            return load_common_state_dict(str(folder))
        except (Exception, CheckpointException) as error:  # a damaged pickle raises anything
            raise DataError(
                f"{folder}: the common state cannot be read ({type(error).__name__}); "
                "the checkpoint is damaged: copy it again or use another iteration"
            ) from error


def _check_format(folder: Path) -> None:
    path = folder / FORMAT_FILE
    if not path.is_file():
        raise DataError(
            f"{folder} holds no {FORMAT_FILE}, which Megatron writes last: the checkpoint is "
            "missing, incomplete, or not saved with --ckpt-format torch_dist"
        )
    try:
        backend = json.loads(path.read_text(encoding="utf-8")).get("sharded_backend")
    except (ValueError, AttributeError):
        backend = None
    if backend != FORMAT["sharded_backend"]:
        raise DataError(
            f"{path} names the format {backend!r}; only {FORMAT['sharded_backend']!r} can be read: "
            "save with --ckpt-format torch_dist"
        )
