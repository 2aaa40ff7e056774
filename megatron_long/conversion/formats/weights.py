"""What every source of weights offers, whatever file it lies in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from torch import Tensor


class Weights(ABC):
    """Named tensors under Hugging Face's names and in its layout, each read when asked for."""

    location: Path
    """File or folder, for messages."""
    _tensors: dict[str, Any]
    """Each tensor, or where it lies, by name."""

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Give the shape of a tensor without reading it."""

    @abstractmethod
    def stored_dtype(self, name: str) -> str:
        """Give safetensors' name of the type in which `read` gives a tensor, such as `BF16`."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Give a whole tensor."""

    @abstractmethod
    def read_slice(self, name: str, rows: slice, columns: slice | None) -> Tensor:
        """Give a part of a tensor; `columns` is None for a vector."""

    def close(self) -> None:
        """Let go of the files."""
        self._tensors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
