"""Checks before, during and after a conversion: names, shapes, types, values, bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_long.checkpoint.stored import STORED_DTYPES
from megatron_long.conversion.formats.weights import Weights
from megatron_long.errors import ConfigError, DataError
from megatron_long.files import refuse_overwrite
from megatron_long.model.geometry import CONFIG_NAME, LlamaGeometry
from megatron_long.model.mapping import OUTPUT_LAYER, units_of

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from megatron_long.checkpoint.torch_dist import TorchDistReader

KEEP = "keep"
DTYPES = (KEEP, "float32", "bfloat16")


def check_folders(input_dir: Path, output_dir: Path, *, force: bool) -> None:
    """Refuse a missing input, and an output that would replace the input.

    Raises: ConfigError: any of these.
    """
    if not input_dir.exists():
        raise ConfigError(f"--input {input_dir} does not exist; give the folder of the model")
    refuse_overwrite(output_dir, force=force)
    source, target = input_dir.resolve(), output_dir.resolve()
    if source == target or target in source.parents:
        raise ConfigError(
            f"--output {output_dir} would replace --input {input_dir}; give another folder"
        )


def check_hf_tensors(weights: Weights, geometry: LlamaGeometry) -> None:
    """Check names and shapes before anything is converted.

    Raises: DataError: a tensor is missing, has another shape, or is unexpected.
    """
    names = set(weights.names)
    if geometry.num_layers > len(names):  # before names are made up for each of them
        raise DataError(
            f"{weights.location} holds {len(names)} tensors, too few for the {geometry.num_layers:,} layers "
            f"of its {CONFIG_NAME} (num_hidden_layers)"
        )
    expected: dict[str, tuple[int, ...]] = {}
    for unit in units_of(geometry):
        shapes = unit.rule.layout.hf_shapes(geometry)
        expected.update(zip(unit.hf_names, shapes, strict=True))
    missing = [name for name in expected if name not in names]
    if missing:
        raise DataError(f"{weights.location} lacks {_list(missing)}, which its {CONFIG_NAME} needs")
    for name, shape in expected.items():
        if weights.shape(name) != shape:
            raise DataError(
                f"{weights.location}: tensor {name} has shape {list(weights.shape(name))}; "
                f"{CONFIG_NAME} makes it {list(shape)}"
            )
    left_over = sorted(name for name in names - set(expected) if not _is_harmless(name, geometry))
    if left_over:
        raise DataError(
            f"{weights.location} holds {_list(left_over)}, which no {geometry.model_type} model has"
        )
    _check_tied_output(weights, geometry)


def _is_harmless(name: str, geometry: LlamaGeometry) -> bool:
    """Old exports carry RoPE frequencies; some of tied models carry the embedding twice."""
    is_tied_output = geometry.tie_embeddings and name == OUTPUT_LAYER.hf_names[0]
    return is_tied_output or name.endswith(".rotary_emb.inv_freq")


def _check_tied_output(weights: Weights, geometry: LlamaGeometry) -> None:
    output, embedding = OUTPUT_LAYER.hf_names[0], next(units_of(geometry)).hf_names[0]
    if not geometry.tie_embeddings or output not in weights.names:
        return
    if not _same_bits(weights.read(output), weights.read(embedding)):
        raise DataError(
            f"{weights.location}: {output} differs from {embedding}, though {CONFIG_NAME} says "
            "tie_word_embeddings; set it to false, or remove the tensor"
        )


def choose_hf_dtype(weights: Weights, geometry: LlamaGeometry, wanted: str) -> dtype:
    """Return the type to store a Hugging Face model in.

    Args:
        weights: The model.
        geometry: Its shape.
        wanted: One of `DTYPES`.
    Raises: ConfigError: `wanted` is unknown, or is `keep` and the model mixes types.
        DataError: a tensor is quantized.
    """
    known = STORED_DTYPES
    found: dict[str, str] = {}
    for unit in units_of(geometry):
        for name in unit.hf_names:
            found.setdefault(weights.stored_dtype(name), name)
    for seen, name in found.items():
        if seen not in known:
            raise DataError(
                f"{weights.location}: tensor {name} is stored as {seen}; known: {', '.join(known)}: "
                "give the unquantized model"
            )
    return _one_dtype({known[seen]: name for seen, name in found.items()}, wanted, weights.location)


def choose_megatron_dtype(reader: TorchDistReader, geometry: LlamaGeometry, wanted: str) -> dtype:
    """Return the type to store a Megatron model in: see `choose_hf_dtype`."""
    found: dict[str, str] = {}
    for unit in units_of(geometry):
        key = unit.rule.megatron_key
        found.setdefault(str(reader.dtype(key)).removeprefix("torch."), key)
    for seen, key in found.items():
        if seen not in STORED_DTYPES.values():
            raise DataError(
                f"{reader.folder}: tensor {key} is stored as {seen}; known: "
                f"{', '.join(STORED_DTYPES.values())}: save the checkpoint with Megatron's own "
                "torch_dist, which stores FP8 parameters in BF16"
            )
    return _one_dtype(found, wanted, reader.folder)


def _one_dtype(found: dict[str, str], wanted: str, folder: Path) -> dtype:
    """Return the wanted type, or the only one found; `found` has a tensor's name for each type."""
    import torch

    if wanted not in DTYPES:
        raise ConfigError(f"--dtype {wanted} is not known; choose from {', '.join(DTYPES)}")
    if wanted == KEEP and len(found) > 1:
        seen = ", ".join(f"{dtype} ({name})" for dtype, name in found.items())
        raise ConfigError(f"{folder} mixes {seen}; choose one with --dtype float32 or bfloat16")
    chosen = getattr(torch, next(iter(found)) if wanted == KEEP else wanted)
    assert isinstance(chosen, torch.dtype)
    return chosen


def check_same(written: Tensor, source: Tensor, name: str) -> None:
    """Raise a `DataError` unless two tensors are equal bit by bit."""
    if not _same_bits(written, source):
        raise DataError(
            f"--verify: tensor {name} read back differs from the input; "
            "the disk or the memory of this machine is faulty; no output was kept"
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Compare bit by bit, so that -0.0 is not 0.0."""
    import torch

    integer = {2: torch.int16, 4: torch.int32}
    views = [tensor.contiguous().view(integer[tensor.itemsize]) for tensor in (one, other)]
    return one.dtype == other.dtype and torch.equal(*views)


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise a `DataError` that calls the tensor `name` if it holds NaN or infinity."""
    import torch

    # Extremes reveal both NaN and infinity, at a hundredth of the cost of checking every value.
    if not all(extreme.isfinite() for extreme in torch.aminmax(tensor)):
        count = int((~torch.isfinite(tensor)).sum())
        raise DataError(
            f"{name} holds {count} values that are NaN or infinite, of {tensor.numel()}; "
            "the weights are damaged: use another copy or an earlier checkpoint"
        )


def _list(names: Sequence[str]) -> str:
    """Name the first few.

    >>> _list(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
