"""Reading Megatron's `torch_dist` folders one piece at a time; `torch_dist_writer` writes them.

`torch_dist` is the folder of `torch.distributed.checkpoint` (DCP) with two additions of Megatron's:
`metadata.json`, and the state other than tensors, pickled as the object `common_state`.
"""

from __future__ import annotations

import io
import json
import zipfile
from argparse import Namespace
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    ReadItem,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_long.checkpoint.stored import read_saved_box, read_saved_tensor
from megatron_long.errors import DataError
from megatron_long.pickles import read_checkpoint_index

INDEX_FILE = ".metadata"
FORMAT_FILE = "metadata.json"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
COMMON_STATE = "common_state/shard_0_1"


class TorchDistReader:
    """The tensors of a `torch_dist` folder, saved from any layout."""

    def __init__(self, folder: Path, *, prefix: str = "", check_bytes: bool = False) -> None:
        """Read the index.

        Args:
            folder: Folder of one iteration.
            prefix: Prefix of the keys, which is removed here.
            check_bytes: Whether to compare the checksum of every piece that is read.
        Raises: DataError: not such a folder, or a file that the index names is missing or short.
        """
        _check_format(folder)
        self.folder = folder
        try:
            self._metadata: Metadata = _read_index(folder)
        except Exception as error:  # a damaged pickle can raise nearly any exception
            raise _unreadable_index(folder, error) from error
        self.prefix = prefix
        self._check_bytes = check_bytes
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
        """Return the global shape of every tensor, including those of the optimizer."""
        return {key: tuple(stored.size) for key, stored in self._tensors()}

    def dtype(self, key: str) -> torch.dtype:
        """Return the type in which a tensor is stored."""
        return dict(self._tensors())[key].properties.dtype

    def _tensors(self) -> list[tuple[str, TensorStorageMetadata]]:
        return [
            (key.removeprefix(self.prefix), stored)
            for key, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and key.startswith(self.prefix)
        ]

    def read(self, key: str, layer: int | None) -> Tensor:
        """Read a tensor, or one layer (an index of axis 0) of it."""
        wanted, items, dtype = self._plan(key, layer)
        try:
            found = self._assemble(items, wanted, dtype)
        except Exception as error:  # damaged bytes can raise nearly any exception
            raise self._unreadable(key, error) from error
        return found if layer is None else found[0]

    def fill_box(self, key: str, offset: Sequence[int], target: Tensor) -> int:
        """Copy a block of a tensor into existing memory, reading only that block.

        Args:
            key: Name of the tensor.
            offset: First index of the block, by axis of the stored tensor.
            target: The same number of axes, any type and device; values beyond the stored tensor, as if the
                vocabulary is padded further, stay unchanged.
        Returns: Number of values copied.
        Raises: DataError: there is no such tensor, or its bytes are damaged.
        """
        stored = self._metadata.state_dict_metadata.get(self.prefix + key)
        if not isinstance(stored, TensorStorageMetadata) or len(stored.size) != target.dim():
            raise DataError(
                f"{self.folder}: there is no tensor {key} of {target.dim()} axes; use another iteration"
            )
        ends = zip(stored.size, offset, target.shape, strict=True)
        sizes = [min(size, whole - first) for whole, first, size in ends]
        if min(sizes, default=1) <= 0:
            return 0
        wanted = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(sizes))
        filled = 0
        for item in create_read_items_for_chunk_list(self.prefix + key, stored, [wanted]):
            place = target
            for axis, start in enumerate(item.dest_offsets):
                place = place.narrow(axis, start, item.lengths[axis])
            try:
                place.copy_(self._box(item))
            except Exception as error:  # damaged bytes can raise nearly any exception
                raise self._unreadable(key, error) from error
            filled += place.numel()
        if filled != prod(sizes):
            raise self._unreadable(key, ValueError(f"{filled} of {prod(sizes)} values are present"))
        return filled

    def _box(self, item: ReadItem) -> Tensor:
        stored = (self._metadata.storage_data or {})[item.storage_index]
        path = self.folder / stored.relative_path
        place = (stored.offset, stored.length)
        return read_saved_box(path, *place, item.storage_offsets, item.lengths)

    def _unreadable(self, key: str, error: Exception) -> DataError:
        return DataError(
            f"{self.folder}: tensor {key} cannot be read ({type(error).__name__}: {error}); "
            "the checkpoint is damaged: copy it again or use another iteration"
        )

    def _plan(
        self, key: str, layer: int | None
    ) -> tuple[ChunkStorageMetadata, list[ReadItem], torch.dtype]:
        key = self.prefix + key
        stored = self._metadata.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata)
        offset, shape = [0] * len(stored.size), list(stored.size)
        if layer is not None:
            offset[0], shape[0] = layer, 1
        wanted = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(shape))
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        return wanted, items, stored.properties.dtype

    def _assemble(
        self, items: Sequence[ReadItem], wanted: ChunkStorageMetadata, dtype: torch.dtype
    ) -> Tensor:
        parts = [(item, self._part(item)) for item in items]
        if len(parts) == 1 and parts[0][1].shape == wanted.sizes:
            return parts[0][1]
        whole = torch.empty(wanted.sizes, dtype=dtype)
        filled = 0
        for item, part in parts:
            target = whole
            for axis, start in enumerate(item.dest_offsets):
                target = target.narrow(axis, start, item.lengths[axis])
            target.copy_(part)
            filled += part.numel()
        if filled != whole.numel():
            raise ValueError(f"{filled} of {whole.numel()} values are present")
        return whole

    def _part(self, item: ReadItem) -> Tensor:
        stored = (self._metadata.storage_data or {})[item.storage_index]
        path = self.folder / stored.relative_path
        piece = read_saved_tensor(path, stored.offset, stored.length, check_bytes=self._check_bytes)
        for axis, start in enumerate(item.storage_offsets):
            piece = piece.narrow(axis, start, item.lengths[axis])
        return piece


def stored_keys(folder: Path) -> set[str]:
    """Return the names of all entries of a checkpoint, including the optimizer's; reads only the index.

    Raises: DataError: it cannot be read.
    """
    _check_format(folder)
    try:
        return set(_read_index(folder).state_dict_metadata)
    except Exception as error:  # a damaged pickle can raise nearly any exception
        raise _unreadable_index(folder, error) from error


def read_common_state(folder: Path) -> dict[str, Any]:
    """Read the content of a checkpoint other than tensors: `args`, `iteration` and so on.

    No class of Megatron is imported, which would take ten seconds: an object other than the few that
    are needed becomes a `_Stub`, and none of its code is run. torch's restricted unpickler reads it.

    Raises: DataError: it cannot be read.
    """
    _check_format(folder)
    try:
        index = _read_index(folder)
    except Exception as error:  # a damaged pickle can raise nearly any exception
        raise _unreadable_index(folder, error) from error
    try:
        stored = (index.storage_data or {})[MetadataIndex(COMMON_STATE)]
        with (folder / stored.relative_path).open("rb") as file:
            file.seek(stored.offset)
            stream = io.BytesIO(file.read(stored.length))
        (state,) = _load_objects(stream)
        if not isinstance(state, dict):
            raise TypeError(f"a {type(state).__name__}")
    except (Exception, CheckpointException) as error:  # a damaged pickle can raise any exception
        raise DataError(
            f"{folder}: the common state cannot be read as tensors and plain values only "
            f"({type(error).__name__}): the checkpoint is damaged, or crafted to run code; "
            "copy it again, use another iteration, or use one from a source that you trust"
        ) from error
    return state


def _unreadable_index(folder: Path, error: Exception) -> DataError:
    return DataError(
        f"{folder}/.metadata cannot be read ({type(error).__name__}: {error}); "
        "the checkpoint is incomplete, damaged, or crafted to run code: use another iteration, or a "
        "source that you trust"
    )


def _read_index(folder: Path) -> Metadata:
    with (folder / INDEX_FILE).open("rb") as file:
        index: Metadata = read_checkpoint_index(file)
    return index


def _load_objects(stream: io.BytesIO) -> Any:
    """Load the output of `torch.save`, with a `_Stub` for each class that torch does not allow.

    Every checksum of the archive is verified.
    """
    with zipfile.ZipFile(stream) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong")
    stream.seek(0)
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(stream)
    stream.seek(0)
    known = {"argparse.Namespace": Namespace}
    taken: list[Any] = [(known.get(name, _Stub), name) for name in unknown]
    with torch.serialization.safe_globals(taken):
        return torch.load(stream, map_location="cpu", weights_only=True)


class _Stub:
    """Placeholder for an object of a class that is not imported; it stores nothing and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Stub:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


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
