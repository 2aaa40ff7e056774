"""The smallest pieces of a conversion, read from either side as Hugging Face tensors."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from megatron_long.conversion.checks import check_finite
from megatron_long.conversion.formats.weights import Weights
from megatron_long.model.geometry import LlamaGeometry
from megatron_long.model.mapping import Unit

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from megatron_long.checkpoint.torch_dist import TorchDistReader


def read_source(unit: Unit, weights: Weights, stored: dtype) -> list[tuple[str, Tensor]]:
    """Read the Hugging Face tensors of a unit in the type that is stored."""
    tensors = [weights.read(name) for name in unit.hf_names]
    for name, tensor in zip(unit.hf_names, tensors, strict=True):
        check_finite(tensor, f"{weights.location}: tensor {name}")
    return [(name, t.to(stored)) for name, t in zip(unit.hf_names, tensors, strict=True)]


def read_checkpoint(
    unit: Unit, reader: TorchDistReader, geometry: LlamaGeometry, stored: dtype
) -> list[tuple[str, Tensor]]:
    """Read a unit from a checkpoint, as Hugging Face tensors in the type that is stored."""
    key = unit.rule.megatron_key
    tensor = reader.read(key, unit.layer)
    where = "" if unit.layer is None else f" (layer {unit.layer})"
    check_finite(tensor, f"{reader.folder}: tensor {key}{where}")
    parts = unit.rule.layout.to_hf(tensor.to(stored), geometry)
    return list(zip(unit.hf_names, parts, strict=True))


def size_of(unit: Unit, geometry: LlamaGeometry, stored: dtype) -> int:
    """Return the bytes of a unit's Hugging Face tensors."""
    shapes = unit.rule.layout.hf_shapes(geometry)
    return sum(prod(shape) for shape in shapes) * stored.itemsize
