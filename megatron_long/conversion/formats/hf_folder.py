"""Hugging Face model folders: safetensors read tensor by tensor, and written in shards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_long.checkpoint.direct_io import FileWriter
from megatron_long.checkpoint.stored import STORED_NAMES, StoredTensor, find_tensors
from megatron_long.conversion.formats.weights import Weights
from megatron_long.errors import ConfigError, DataError
from megatron_long.model.geometry import LlamaGeometry
from megatron_long.model.rope_hf import ORIGINAL_LENGTH

if TYPE_CHECKING:
    from torch import Tensor, dtype

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"


class HfWeights(Weights):
    """The tensors of a folder; each is read on request."""

    def __init__(self, folder: Path) -> None:
        """Open every file and read its header.

        Raises: ConfigError: there are no safetensors in it.
            DataError: a file is missing, truncated, or disagrees with the index.
        """
        self.location = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._tensors: dict[str, StoredTensor] = {}
        try:
            for path, names in weight_files(folder).items():
                self._open(path, names)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, path: Path, names: Sequence[str] | None) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            opened = self._stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"{path} is not a complete safetensors file ({error}); download it again"
            ) from error
        held = list(opened.keys())
        for name in names or held:
            if name not in held:
                raise DataError(
                    f"{path} does not hold {name}, which {INDEX_FILE} says it does; "
                    "download the model again"
                )
        self._files.update(dict.fromkeys(names or held, opened))
        self._tensors.update(find_tensors(path, names or held))

    def close(self) -> None:
        """Close the files."""
        super().close()
        self._stack.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor from its file's header."""
        return self._tensors[name].shape

    def stored_dtype(self, name: str) -> str:
        """Return safetensors' name of the type in which a tensor is stored, such as `BF16`."""
        return self._tensors[name].stored_dtype

    def read(self, name: str) -> Tensor:
        """Return a whole tensor."""
        return self._tensors[name].tensor()

    def read_slice(self, name: str, rows: slice, columns: slice | None) -> Tensor:
        """Return a part of a tensor; `columns` is None for a vector."""
        held = self._files[name].get_slice(name)
        return held[rows] if columns is None else held[rows, columns]


def weight_files(
    folder: Path, single: str = SINGLE_FILE, index_name: str = INDEX_FILE
) -> dict[Path, list[str] | None]:
    """Return the files of a folder's weights, each with the names that the index puts there.

    Args:
        folder: The model's folder.
        single: Name of the file of a model in one file.
        index_name: Name of the index of a model in several files.
    Raises: ConfigError: neither is there.
        DataError: the index is damaged, or names a missing file.
    """
    index = folder / index_name
    if index.is_file():
        return _indexed_files(index)
    if (folder / single).is_file():
        return {folder / single: None}
    raise ConfigError(
        f"{folder} holds neither {single} nor {index_name}; download the model's safetensors files"
    )


def _indexed_files(index: Path) -> dict[Path, list[str] | None]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        entries = sorted((str(file), str(name)) for name, file in weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{index} is not an index of weights ({type(error).__name__}: {error}); "
            "download it again"
        ) from error
    files: dict[Path, list[str] | None] = {}
    for file, name in entries:
        path = index.parent / file
        if not path.is_file():
            raise DataError(f"{index} names {file}, which is missing; download that file")
        names = files.setdefault(path, [])
        assert names is not None
        names.append(name)
    return files


def plan_shards(sizes_bytes: Sequence[int], max_shard_bytes: int) -> list[list[int]]:
    """Distribute pieces, in their order, over as few shards as the limit allows.

    A piece above the limit gets a shard of its own.

    >>> plan_shards([3, 3, 3, 9, 1], 6)
    [[0, 1], [2], [3], [4]]
    """
    shards: list[list[int]] = []
    used = 0
    for number, size in enumerate(sizes_bytes):
        if not shards or used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(number)
        used += size
    return shards


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: dtype

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_weights(
    folder: Path,
    shards: Sequence[Sequence[PlannedTensor]],
    tensors: Iterator[tuple[str, Tensor]],
) -> None:
    """Write safetensors, holding one tensor at a time, and the index when there are several files.

    Args:
        folder: An existing folder.
        shards: What each file holds.
        tensors: All of it, by name, in that order; consumed as it is written.
    Raises: DataError: writing fails.
    """
    weight_map: dict[str, str] = {}
    for number, planned in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = SINGLE_FILE if len(shards) == 1 else name
        try:
            _write_file(folder / file, planned, tensors)
        except OSError as error:
            raise DataError(f"{file} cannot be written: {error}; free some space") from error
        weight_map.update({tensor.name: file for tensor in planned})
    if len(shards) > 1:
        size_bytes = sum(tensor.size_bytes for planned in shards for tensor in planned)
        index = {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX_FILE).write_text(text, encoding="utf-8")


def _write_file(
    path: Path, planned: Sequence[PlannedTensor], tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """Write one file: length of the header, header, bytes. The library can only write a dictionary."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in planned:
        start, end = end, end + tensor.size_bytes
        stored = STORED_NAMES[str(tensor.dtype).removeprefix("torch.")]
        entry = {"dtype": stored, "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[tensor.name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with FileWriter(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected in planned:
            name, value = next(tensors)
            same = (name, tuple(value.shape), value.dtype) == (
                expected.name,
                expected.shape,
                expected.dtype,
            )
            assert same, (name, value.shape, value.dtype, expected)
            flat = value.contiguous().reshape(-1).view(torch.uint8)
            file.write(flat.numpy())
            file.raise_error()


def write_config(
    path: Path, original: Mapping[str, Any], geometry: LlamaGeometry, stored: dtype
) -> None:
    """Write `config.json` so that transformers 4 and 5 both read the trained model's RoPE.

    Args:
        path: The file.
        original: The model's original configuration; what training does not change is kept.
        geometry: The trained model's.
        stored: The type of the tensors.
    """
    dtype_name = str(stored).removeprefix("torch.")
    kept = {key: value for key, value in original.items() if key != ORIGINAL_LENGTH}
    config = {
        **kept,  # transformers 5 would prefer a top-level original length to that of the trained RoPE
        **geometry.to_hf_rope(),
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
