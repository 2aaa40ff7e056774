"""Which rows and columns of the Hugging Face tensors form a block of a Megatron tensor.

Derived from the mapping table: each Hugging Face row is numbered, the numbers pass through the
layout's own `to_megatron`, and their positions in the result show which row is where. So a rank can read its
slices without a second description of any layout.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_long.checkpoint.stored import STORED_DTYPES
from megatron_long.conversion.checks import check_finite
from megatron_long.conversion.formats.weights import Weights
from megatron_long.model.geometry import LlamaGeometry
from megatron_long.model.mapping import Layout, Unit

if TYPE_CHECKING:
    from torch import Tensor

_TENSOR_STRIDE = 2**40
"""Offset between the row numbers of consecutive tensors; no tensor has so many rows."""


@dataclass(frozen=True)
class RowRun:
    """Consecutive rows of one Hugging Face tensor."""

    source: int | None
    """Which tensor of the rule; None: padding, which is zero."""
    first: int
    count: int


def row_runs(layout: Layout, geometry: LlamaGeometry, first: int, count: int) -> list[RowRun]:
    """Return the Hugging Face rows behind `count` rows of a Megatron tensor, in order."""
    import torch

    numbered = []
    for source, shape in enumerate(layout.hf_shapes(geometry)):
        rows = torch.arange(shape[0]) + source * _TENSOR_STRIDE + 1  # 0 is left to padding
        numbered.append(rows.reshape(-1, *[1] * (len(shape) - 1)))
    numbers = layout.to_megatron(numbered, geometry).flatten()[first : first + count]
    steps = torch.diff(numbers)
    goes_on = (steps == 1) & (numbers[:-1] != 0) | (steps == 0)
    starts = [0, *(torch.nonzero(~goes_on).flatten() + 1).tolist(), len(numbers)]
    return [
        _run(int(numbers[start]), stop - start)
        for start, stop in itertools.pairwise(starts)
        if stop > start
    ]


def _run(number: int, count: int) -> RowRun:
    if number == 0:
        return RowRun(None, 0, count)
    source, first = divmod(number - 1, _TENSOR_STRIDE)
    return RowRun(source, first, count)


def read_block(
    unit: Unit,
    weights: Weights,
    geometry: LlamaGeometry,
    offset: Sequence[int],
    shape: Sequence[int],
) -> Tensor:
    """Read only a block of a Megatron tensor from Hugging Face weights.

    Args:
        unit: The tensor, of one layer where it has layers.
        weights: Where to read.
        geometry: The model's shape.
        offset: Where the block begins in the Megatron tensor, layers not counted.
        shape: Its size.
    Returns: The block in the stored type.
    Raises: DataError: it holds NaN or infinity.
    """
    import torch

    columns = slice(offset[1], offset[1] + shape[1]) if len(shape) > 1 else None
    names = unit.hf_names
    dtype = getattr(torch, STORED_DTYPES[weights.stored_dtype(names[0])])
    parts = []
    for run in row_runs(unit.rule.layout, geometry, offset[0], shape[0]):
        if run.source is None:
            parts.append(torch.zeros(run.count, *shape[1:], dtype=dtype))
            continue
        rows = slice(run.first, run.first + run.count)
        parts.append(weights.read_slice(names[run.source], rows, columns))
        check_finite(parts[-1], f"{weights.location}: tensor {names[run.source]}")
    return torch.cat(parts)
