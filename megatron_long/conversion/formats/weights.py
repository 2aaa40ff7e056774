"""The interface of every source of weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from torch import Tensor


class Weights(ABC):
    """Tensors with Hugging Face's names and layout, each read on request."""

    location: Path
    """File or folder, for messages."""
    _tensors: dict[str, Any]
    """Each tensor, or where it is stored, by name."""

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""

    @abstractmethod
    def stored_dtype(self, name: str) -> str:
        """Return safetensors' name of the type in which `read` gives a tensor, such as `BF16`."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return a whole tensor."""

    @abstractmethod
    def read_slice(self, name: str, rows: slice, columns: slice | None) -> Tensor:
        """Return a part of a tensor; `columns` is None for a vector."""

    def close(self) -> None:
        """Close the files."""
        self._tensors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
