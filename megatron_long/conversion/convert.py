"""Weights between a Hugging Face folder and a Megatron checkpoint, in both directions.

Every tensor is read when it is needed and dropped when it is written, so that memory holds a layer
(from Hugging Face) or a shard (to it), never the model. What is written is whole or absent.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_long.conversion import hf_folder
from megatron_long.conversion.checks import (
    KEEP,
    check_finite,
    check_folders,
    check_hf_tensors,
    check_same,
    choose_hf_dtype,
    choose_megatron_dtype,
)
from megatron_long.conversion.hf_folder import HfWeights
from megatron_long.conversion.mapping import (
    Unit,
    checkpoint_shape,
    megatron_shape,
    units_of,
)
from megatron_long.conversion.megatron_folder import (
    RELEASE,
    check_tensors,
    common_state,
    extra_states,
    find_iteration,
    merge_geometry,
)
from megatron_long.errors import ConfigError
from megatron_long.files import atomic_path
from megatron_long.model.geometry import (
    CONFIG_NAME,
    LlamaGeometry,
    geometry_from_config,
    read_hf_config,
)
from megatron_long.training.checkpoint_folder import (
    GENERATION_CONFIG_NAME,
    HF_CONFIG_NAME,
    TOKENIZER_DIR_NAME,
    TRACKER_NAME,
)
from megatron_long.training.checkpoint_hashes import (
    files_within,
    hash_files,
    write_hashes,
    write_sidecar_hashes,
)

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from megatron_long.conversion.torch_dist import LazyPiece, TorchDistReader

MAX_SHARD_BYTES = 5 * 10**9

Progress = Callable[[int], object]
"""Called with the number of bytes that were just converted or verified."""


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What a conversion did, or would do."""

    output: Path
    num_tensors: int
    """Hugging Face tensors."""
    num_parameters: int
    size_bytes: int
    dtype: str
    geometry: LlamaGeometry
    is_verified: bool


def hf_to_megatron(
    input_dir: Path,
    output_dir: Path,
    *,
    dtype: str = KEEP,
    rotary_base: float | None = None,
    verify: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda size_bytes: None,
) -> ConversionReport:
    """Write a Megatron checkpoint from a Hugging Face Llama.

    Args:
        input_dir: Folder with `config.json`, safetensors and, usually, a tokenizer.
        output_dir: The checkpoint folder, for Megatron's `--load`.
        dtype: One of `DTYPES`, the type to store.
        rotary_base: RoPE base to train with instead of the model's own.
        verify: Whether to read the checkpoint back and compare it with the input, bit by bit.
        force: Whether to replace an existing output.
        dry_run: Whether to check the input and write nothing.
        progress: See `Progress`.
    Raises: ConfigError, DataError: the message says what is wrong; nothing is left behind.
    """
    check_folders(input_dir, output_dir, force=force)
    config = read_hf_config(input_dir / CONFIG_NAME)
    geometry = geometry_from_config(config, name=str(input_dir / CONFIG_NAME))
    if rotary_base is not None:
        geometry = replace(geometry, rotary_base=rotary_base)
    geometry.to_argv()  # refuses a base that no Megatron flag can carry
    with HfWeights(input_dir) as weights:
        check_hf_tensors(weights, geometry)
        stored = choose_hf_dtype(weights, geometry, dtype)
        report = _report(output_dir, geometry, stored, is_verified=verify and not dry_run)
        if dry_run:
            return report
        with atomic_path(output_dir, directory=True) as folder:
            _write_megatron(folder, weights, geometry, stored, progress)
            hf_folder.write_config(folder / HF_CONFIG_NAME, config, geometry, stored)
            _write_sidecars(folder, input_dir)
            release = folder / RELEASE
            write_hashes(release, hash_files(release, files_within(release)))
            write_sidecar_hashes(folder, RELEASE)
            if verify:
                _verify_megatron(folder, weights, geometry, stored, progress)
    return report


def megatron_to_hf(
    input_dir: Path,
    output_dir: Path,
    *,
    iteration: int | None = None,
    dtype: str = KEEP,
    hf_config: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    verify: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda size_bytes: None,
) -> ConversionReport:
    """Write a Hugging Face Llama from a Megatron checkpoint saved in any layout.

    The optimizer's state is skipped. RoPE base and longest context are those of training.

    Args:
        input_dir: The checkpoint folder (Megatron's `--save`).
        output_dir: The model folder to write.
        iteration: Which iteration; the latest if None.
        dtype: One of `DTYPES`, the type to store.
        hf_config: Model folder whose `config.json`, and tokenizer if the checkpoint has none, to
            take instead of the checkpoint's own.
        max_shard_bytes: Largest safetensors file.
        verify: Whether to read the files back and compare them with the checkpoint, bit by bit.
        force: Whether to replace an existing output.
        dry_run: Whether to check the input and write nothing.
        progress: See `Progress`.
    Raises: ConfigError, DataError: the message says what is wrong; nothing is left behind.
    """
    from megatron_long.conversion.torch_dist import TorchDistReader, read_common_state

    source = find_iteration(input_dir, iteration)
    check_folders(input_dir, output_dir, force=force)
    config_path = hf_config / CONFIG_NAME if hf_config else input_dir / HF_CONFIG_NAME
    if not config_path.is_file():
        raise ConfigError(f"{config_path} does not exist; give --hf-config with the model's folder")
    config = read_hf_config(config_path)
    reader = TorchDistReader(source)
    hf_geometry = geometry_from_config(config, name=str(config_path))
    geometry = merge_geometry(hf_geometry, read_common_state(source), source)
    check_tensors(reader, geometry)
    stored = choose_megatron_dtype(reader, geometry, dtype)
    report = _report(output_dir, geometry, stored, is_verified=verify and not dry_run)
    if dry_run:
        return report
    with atomic_path(output_dir, directory=True) as folder:
        _write_hf(folder, reader, geometry, stored, max_shard_bytes, progress)
        hf_folder.write_config(folder / CONFIG_NAME, config, geometry, stored)
        _restore_sidecars(folder, input_dir, hf_config)
        if verify:
            _verify_hf(folder, reader, geometry, stored, progress)
    return report


def _write_megatron(
    folder: Path, weights: HfWeights, geometry: LlamaGeometry, stored: dtype, progress: Progress
) -> None:
    from megatron_long.conversion.torch_dist import COMMON_STATE, write_torch_dist

    def make(unit: Unit, shape: tuple[int, ...]) -> Tensor:
        tensor = _make_megatron(unit, weights, geometry, stored)
        progress(tensor.nbytes)
        return tensor.reshape(shape)

    pieces = [_plan_piece(unit, geometry, stored, make) for unit in units_of(geometry)]
    objects: dict[str, Any] = {
        **extra_states(geometry),
        COMMON_STATE: common_state(geometry, stored),
    }
    write_torch_dist(folder / RELEASE, pieces, objects)
    (folder / TRACKER_NAME).write_text(RELEASE, encoding="utf-8")


def _plan_piece(
    unit: Unit,
    geometry: LlamaGeometry,
    stored: dtype,
    make: Callable[[Unit, tuple[int, ...]], Tensor],
) -> LazyPiece:
    from megatron_long.conversion.torch_dist import LazyPiece

    global_shape = checkpoint_shape(unit.rule, geometry)
    shape = megatron_shape(unit.rule, geometry)
    offset = [0] * len(global_shape)
    if unit.layer is not None:
        shape = (1, *shape)
        offset[0] = unit.layer
    return LazyPiece(
        key=unit.rule.megatron_key,
        global_shape=global_shape,
        offset=tuple(offset),
        shape=shape,
        dtype=stored,
        make=partial(make, unit, shape),
    )


def _make_megatron(
    unit: Unit, weights: HfWeights, geometry: LlamaGeometry, stored: dtype
) -> Tensor:
    tensors = [weights.read(name) for name in unit.hf_names]
    for name, tensor in zip(unit.hf_names, tensors, strict=True):
        check_finite(tensor, f"{weights.folder}: tensor {name}")
    return unit.rule.layout.to_megatron([tensor.to(stored) for tensor in tensors], geometry)


def _make_hf(
    unit: Unit, reader: TorchDistReader, geometry: LlamaGeometry, stored: dtype
) -> list[tuple[str, Tensor]]:
    key = unit.rule.megatron_key
    tensor = reader.read(key, unit.layer)
    where = "" if unit.layer is None else f" (layer {unit.layer})"
    check_finite(tensor, f"{reader.folder}: tensor {key}{where}")
    parts = unit.rule.layout.to_hf(tensor.to(stored), geometry)
    return list(zip(unit.hf_names, parts, strict=True))


def _write_hf(
    folder: Path,
    reader: TorchDistReader,
    geometry: LlamaGeometry,
    stored: dtype,
    max_shard_bytes: int,
    progress: Progress,
) -> None:
    units = list(units_of(geometry))
    sizes_bytes = [_size_bytes(unit, geometry, stored) for unit in units]

    def tensors_of(numbers: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
        for number in numbers:
            yield from _make_hf(units[number], reader, geometry, stored)
            progress(sizes_bytes[number])

    shards = hf_folder.plan_shards(sizes_bytes, max_shard_bytes)
    hf_folder.write_weights(folder, [tensors_of(shard) for shard in shards], sum(sizes_bytes))


def _verify_megatron(
    folder: Path, weights: HfWeights, geometry: LlamaGeometry, stored: dtype, progress: Progress
) -> None:
    from megatron_long.conversion.torch_dist import TorchDistReader

    reader = TorchDistReader(folder / RELEASE)
    check_tensors(reader, geometry)
    for unit in units_of(geometry):
        written = dict(_make_hf(unit, reader, geometry, stored))
        for name, tensor in written.items():
            check_same(tensor, weights.read(name).to(stored), name)
        progress(_size_bytes(unit, geometry, stored))


def _verify_hf(
    folder: Path,
    reader: TorchDistReader,
    geometry: LlamaGeometry,
    stored: dtype,
    progress: Progress,
) -> None:
    with HfWeights(folder) as weights:
        check_hf_tensors(weights, geometry)
        for unit in units_of(geometry):
            for name, tensor in _make_hf(unit, reader, geometry, stored):
                check_same(weights.read(name), tensor, name)
            progress(_size_bytes(unit, geometry, stored))


def _size_bytes(unit: Unit, geometry: LlamaGeometry, stored: dtype) -> int:
    shapes = unit.rule.layout.hf_shapes(geometry)
    return sum(prod(shape) for shape in shapes) * stored.itemsize


def _report(
    output: Path, geometry: LlamaGeometry, stored: dtype, *, is_verified: bool
) -> ConversionReport:
    units = list(units_of(geometry))
    size_bytes = sum(_size_bytes(unit, geometry, stored) for unit in units)
    return ConversionReport(
        output=output,
        num_tensors=sum(len(unit.hf_names) for unit in units),
        num_parameters=size_bytes // stored.itemsize,
        size_bytes=size_bytes,
        dtype=str(stored).removeprefix("torch."),
        geometry=geometry,
        is_verified=is_verified,
    )


def _write_sidecars(folder: Path, model_dir: Path) -> None:
    generation = model_dir / hf_folder.GENERATION_CONFIG
    if generation.is_file():
        shutil.copyfile(generation, folder / GENERATION_CONFIG_NAME)
    hf_folder.copy_tokenizer(model_dir, folder / TOKENIZER_DIR_NAME)


def _restore_sidecars(folder: Path, checkpoint_dir: Path, hf_config: Path | None) -> None:
    generation = checkpoint_dir / GENERATION_CONFIG_NAME
    if hf_config and not generation.is_file():
        generation = hf_config / hf_folder.GENERATION_CONFIG
    if generation.is_file():
        shutil.copyfile(generation, folder / hf_folder.GENERATION_CONFIG)
    copied = hf_folder.copy_tokenizer(checkpoint_dir / TOKENIZER_DIR_NAME, folder)
    if hf_config and not copied:
        hf_folder.copy_tokenizer(hf_config, folder)
