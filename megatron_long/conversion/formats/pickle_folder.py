"""Pickled weights (`pytorch_model.bin`), read with torch's restricted unpickler, on request only.

A pickle can run code when it is read. `weights_only` lets through tensors and plain containers and
refuses everything else; still, nothing here is opened unless the user asked for it by flag.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_long.checkpoint.stored import STORED_NAMES
from megatron_long.conversion.formats.hf_folder import weight_files
from megatron_long.conversion.formats.weights import Weights
from megatron_long.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE = "pytorch_model.bin"
INDEX_FILE = "pytorch_model.bin.index.json"


class PickleWeights(Weights):
    """The tensors of a folder of pickles, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Open every file.

        Raises: ConfigError: there are no pickles in it.
            DataError: a file is missing, damaged, or holds values that are not tensors.
        """
        self.location = folder
        self._tensors = {}
        for path, names in weight_files(folder, SINGLE_FILE, INDEX_FILE).items():
            self._open(path, names)

    def _open(self, path: Path, names: Sequence[str] | None) -> None:
        import torch

        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged or hostile pickle can raise any exception
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"{path} cannot be read as weights only ({first_line}); it is damaged, in torch's old "
                "format, or holds more than tensors: use the model's safetensors files"
            ) from error
        if not isinstance(held, dict):
            raise DataError(f"{path} holds a {type(held).__name__}; it must be named tensors")
        for name in names or held:
            if not isinstance(held.get(name), torch.Tensor):
                raise DataError(f"{path} holds no tensor {name}; download the model again")
            self._tensors[name] = held[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def stored_dtype(self, name: str) -> str:
        """Return safetensors' name of a tensor's type, or torch's if it has none."""
        stored = str(self._tensors[name].dtype)
        return STORED_NAMES.get(stored.removeprefix("torch."), stored)

    def read(self, name: str) -> Tensor:
        """Return a copy of a tensor."""
        import torch

        return self._tensors[name].clone(memory_format=torch.contiguous_format)

    def read_slice(self, name: str, rows: slice, columns: slice | None) -> Tensor:
        """Return a part of a tensor; `columns` is None for a vector."""
        held = self._tensors[name]
        return (held[rows] if columns is None else held[rows, columns]).contiguous()
