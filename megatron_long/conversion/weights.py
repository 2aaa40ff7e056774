"""What every source of weights offers, whatever file it lies in."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from torch import Tensor

STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""safetensors' names of the types that are taken, and torch's."""


class Weights(Protocol):
    """Named tensors under Hugging Face's names and in its layout, each read when asked for."""

    location: Path
    """File or folder, for messages."""

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Give the shape of a tensor without reading it."""

    def stored_dtype(self, name: str) -> str:
        """Give safetensors' name of the type in which `read` gives a tensor, such as `BF16`."""

    def will_need(self, name: str) -> None:
        """Say that a tensor is read soon."""

    def read(self, name: str) -> Tensor:
        """Give a whole tensor."""

    def read_slice(self, name: str, rows: slice, columns: slice | None) -> Tensor:
        """Give a part of a tensor; `columns` is None for a vector."""

    def __enter__(self) -> Self:
        """Give the source itself."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of the files."""
