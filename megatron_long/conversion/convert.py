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

from megatron_long.conversion import hf_folder, sources
from megatron_long.conversion.checks import (
    KEEP,
    check_finite,
    check_folders,
    check_hf_tensors,
    choose_hf_dtype,
    choose_megatron_dtype,
)
from megatron_long.conversion.mapping import (
    Unit,
    checkpoint_shape,
    megatron_shape,
    units_of,
)
from megatron_long.conversion.megatron_folder import (
    RELEASE,
    check_same_rope,
    check_tensors,
    common_state,
    extra_states,
    find_iteration,
    find_weights,
    merge_geometry,
)
from megatron_long.conversion.stored import ReadAhead
from megatron_long.conversion.stretch import Stretch
from megatron_long.conversion.verify import compare_logits, compare_tensors, write_verification
from megatron_long.conversion.weights import Weights
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

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from megatron_long.conversion.torch_dist import LazyPiece, TorchDistReader

MAX_SHARD_BYTES = 5 * 10**9

Progress = Callable[[int], object]
"""Called with the number of bytes that were just converted or verified."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every conversion may be asked for."""

    dtype: str = KEEP
    """One of `DTYPES`, the type to store."""
    verify: bool = False
    """Whether to read the output back, compare it bit by bit and write the tensors' hashes."""
    check_logits: bool = False
    """Whether to compare the logits of both models too."""
    force: bool = False
    """Whether to replace an existing output."""
    dry_run: bool = False
    """Whether to check the input and write nothing."""
    allow_pickle: bool = False
    """Whether pickled weights may be read where there are no safetensors."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """Largest safetensors file."""
    progress: Progress = lambda size_bytes: None


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
    is_verified: bool = False
    logits_difference: float | None = None
    """Of the largest logit; None where logits were not compared."""
    losses: tuple[str, ...] = ()
    """What the input does not give back of the original model, in sentences."""


def hf_to_megatron(
    input_path: Path,
    output_dir: Path,
    *,
    stretch: Stretch | None = None,
    options: Options | None = None,
) -> ConversionReport:
    """Write a Megatron checkpoint from a Hugging Face model.

    Args:
        input_path: Folder with `config.json`, weights and, usually, a tokenizer; or a GGUF file.
        output_dir: The checkpoint folder, for Megatron's `--load`.
        stretch: RoPE and context to train with instead of the model's own.
        options: See `Options`.
    Raises: ConfigError, DataError: the message says what is wrong; nothing is left behind.
    """
    options = options or Options()
    check_folders(input_path, output_dir, force=options.force)
    config = sources.read_config(input_path)
    geometry = (stretch or Stretch()).apply(sources.read_source_geometry(input_path))
    geometry.to_argv()  # refuses a base that no Megatron flag can carry
    with sources.open_weights(input_path, allow_pickle=options.allow_pickle) as weights:
        check_hf_tensors(weights, geometry)
        stored = choose_hf_dtype(weights, geometry, options.dtype)
        report = _report(output_dir, geometry, stored, sources.losses(input_path))
        if options.dry_run:
            return report
        with atomic_path(output_dir, directory=True) as folder:
            _write_megatron(folder, weights, geometry, stored, options.progress)
            hf_folder.write_config(folder / HF_CONFIG_NAME, config, geometry, stored)
            sources.copy_generation_config(input_path, folder / GENERATION_CONFIG_NAME)
            sources.copy_tokenizer(input_path, folder / TOKENIZER_DIR_NAME)
            return _verify(
                report, folder, _reader_of(folder), weights, stored, options, is_import=True
            )


def megatron_to_hf(
    input_dir: Path,
    output_dir: Path,
    *,
    iteration: int | None = None,
    hf_config: Path | None = None,
    weights: str = "auto",
    stretch: Stretch | None = None,
    options: Options | None = None,
) -> ConversionReport:
    """Write a Hugging Face model from a Megatron checkpoint saved in any layout.

    The optimizer's state is skipped, but for its main copy of FP8 parameters. RoPE and the longest
    context are those of training.

    Args:
        input_dir: The checkpoint folder (Megatron's `--save`).
        output_dir: The model folder to write.
        iteration: Which iteration; the latest if None.
        hf_config: Model folder whose `config.json`, and tokenizer if the checkpoint has none, to
            take instead of the checkpoint's own.
        weights: One of `WEIGHTS`.
        stretch: RoPE and context that the user takes for trained; refused where training had others.
        options: See `Options`.
    Raises: ConfigError, DataError: the message says what is wrong; nothing is left behind.
    """
    from megatron_long.conversion.torch_dist import TorchDistReader, read_common_state

    options = options or Options()
    source = find_iteration(input_dir, iteration)
    check_folders(input_dir, output_dir, force=options.force)
    TorchDistReader(source)  # its files are all there, before anything else is said of it
    state = read_common_state(source)
    config, geometry = _trained_model(input_dir, source, state, hf_config, stretch or Stretch())
    prefix = find_weights(state, weights, source)
    reader = TorchDistReader(source, prefix=prefix, check_bytes=options.verify)
    check_tensors(reader, geometry)
    is_main = (
        prefix and options.dtype == KEEP
    )  # float32, for a model that was trained in another type
    dtype = str(state["args"].params_dtype).removeprefix("torch.") if is_main else options.dtype
    stored = choose_megatron_dtype(reader, geometry, dtype)
    report = _report(output_dir, geometry, stored)
    if options.dry_run:
        return report
    ahead = ReadAhead(
        list(units_of(geometry)),
        lambda unit: reader.will_need(unit.rule.megatron_key, unit.layer),
        lambda unit: _size_bytes(unit, geometry, stored),
    )

    def read(unit: Unit) -> list[tuple[str, Tensor]]:
        ahead.reach(unit)
        return _make_hf(unit, reader, geometry, stored)

    with atomic_path(output_dir, directory=True) as folder:
        _write_hf(folder, read, geometry, stored, options)
        hf_folder.write_config(folder / CONFIG_NAME, config, geometry, stored)
        _restore_sidecars(folder, input_dir, hf_config)
        if not (options.verify or options.check_logits):
            return report
        with hf_folder.HfWeights(folder) as written:
            check_hf_tensors(written, geometry)
            return _verify(report, folder, reader, written, stored, options, is_import=False)


def gguf_to_hf(
    input_path: Path, output_dir: Path, *, options: Options | None = None
) -> ConversionReport:
    """Write a Hugging Face folder from a GGUF file, weights dequantized.

    Args:
        input_path: The file.
        output_dir: The model folder to write.
        options: See `Options`; logits are not compared, as there is one model only.
    Raises: ConfigError, DataError: the message says what is wrong; nothing is left behind.
    """
    options = options or Options()
    check_folders(input_path, output_dir, force=options.force)
    if not sources.is_gguf(input_path):
        raise ConfigError(f"--input {input_path} is no GGUF file (its name must end in .gguf)")
    config, geometry = sources.read_config(input_path), sources.read_source_geometry(input_path)
    with sources.open_weights(input_path) as weights:
        check_hf_tensors(weights, geometry)
        stored = choose_hf_dtype(weights, geometry, options.dtype)
        report = _report(output_dir, geometry, stored, sources.losses(input_path))
        if options.dry_run:
            return report
        read = partial(_read_source, weights=weights, stored=stored)
        with atomic_path(output_dir, directory=True) as folder:
            _write_hf(folder, read, geometry, stored, options)
            hf_folder.write_config(folder / CONFIG_NAME, config, geometry, stored)
            sources.copy_tokenizer(input_path, folder)
            if not options.verify:
                return report
            with hf_folder.HfWeights(folder) as written:
                back = partial(_read_source, weights=written, stored=stored)
                hashes = compare_tensors(units_of(geometry), back, read, options.progress)
            write_verification(folder, hashes, None)
    return replace(report, is_verified=True)


def _trained_model(
    input_dir: Path, source: Path, state: dict[str, Any], hf_config: Path | None, stretch: Stretch
) -> tuple[dict[str, Any], LlamaGeometry]:
    """Give the model's configuration as it came, and its shape with the RoPE of training."""
    config_path = hf_config / CONFIG_NAME if hf_config else input_dir / HF_CONFIG_NAME
    if not config_path.is_file():
        raise ConfigError(f"{config_path} does not exist; give --hf-config with the model's folder")
    config = read_hf_config(config_path)
    described = geometry_from_config(config, name=str(config_path))
    geometry = merge_geometry(described, state, source)
    if hf_config is None:
        check_same_rope(geometry, described, source, str(config_path))
    asked = stretch.apply(geometry)
    check_same_rope(geometry, asked, source, "the flags of this command")
    return config, geometry


def _verify(
    report: ConversionReport,
    folder: Path,
    reader: TorchDistReader,
    weights: Weights,
    stored: dtype,
    options: Options,
    *,
    is_import: bool,
) -> ConversionReport:
    """Compare what lies in `folder` with what it was made from, and write that down."""
    geometry, logits = report.geometry, None
    if not (options.verify or options.check_logits):
        return report
    check_tensors(reader, geometry)
    megatron = partial(_make_hf, reader=reader, geometry=geometry, stored=stored)
    hugging_face = partial(_read_source, weights=weights, stored=stored)
    both = (megatron, hugging_face) if is_import else (hugging_face, megatron)
    hashes = compare_tensors(units_of(geometry), *both, options.progress)
    if options.check_logits:
        config = folder / (HF_CONFIG_NAME if is_import else CONFIG_NAME)
        logits = compare_logits(
            reader, weights.location, config, stored, allow_pickle=options.allow_pickle
        )
    write_verification(folder, hashes, logits)
    return replace(report, is_verified=True, logits_difference=logits)


def _reader_of(folder: Path) -> TorchDistReader:
    from megatron_long.conversion.torch_dist import TorchDistReader

    return TorchDistReader(folder / RELEASE)


def _read_source(unit: Unit, weights: Weights, stored: dtype) -> list[tuple[str, Tensor]]:
    """Read the Hugging Face tensors of a unit in the type that is stored."""
    tensors = [weights.read(name) for name in unit.hf_names]
    for name, tensor in zip(unit.hf_names, tensors, strict=True):
        check_finite(tensor, f"{weights.location}: tensor {name}")
    return [(name, t.to(stored)) for name, t in zip(unit.hf_names, tensors, strict=True)]


def _write_megatron(
    folder: Path, weights: Weights, geometry: LlamaGeometry, stored: dtype, progress: Progress
) -> None:
    from megatron_long.conversion.torch_dist import COMMON_STATE, write_torch_dist

    ahead = ReadAhead(
        list(units_of(geometry)),
        lambda unit: list(map(weights.will_need, unit.hf_names)),
        lambda unit: _size_bytes(unit, geometry, stored),
    )

    def make(unit: Unit, shape: tuple[int, ...]) -> Tensor:
        ahead.reach(unit)
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


def _make_megatron(unit: Unit, weights: Weights, geometry: LlamaGeometry, stored: dtype) -> Tensor:
    tensors = [tensor for _, tensor in _read_source(unit, weights, stored)]
    return unit.rule.layout.to_megatron(tensors, geometry)


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
    read: Callable[[Unit], list[tuple[str, Tensor]]],
    geometry: LlamaGeometry,
    stored: dtype,
    options: Options,
) -> None:
    units = list(units_of(geometry))
    sizes_bytes = [_size_bytes(unit, geometry, stored) for unit in units]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for unit, size_bytes in zip(units, sizes_bytes, strict=True):
            yield from read(unit)
            options.progress(size_bytes)

    shards = [
        [
            hf_folder.PlannedTensor(name=name, shape=shape, dtype=stored)
            for number in numbers
            for name, shape in _hf_shapes(units[number], geometry)
        ]
        for numbers in hf_folder.plan_shards(sizes_bytes, options.max_shard_bytes)
    ]
    hf_folder.write_weights(folder, shards, tensors())


def _hf_shapes(unit: Unit, geometry: LlamaGeometry) -> list[tuple[str, tuple[int, ...]]]:
    return list(zip(unit.hf_names, unit.rule.layout.hf_shapes(geometry), strict=True))


def _size_bytes(unit: Unit, geometry: LlamaGeometry, stored: dtype) -> int:
    shapes = unit.rule.layout.hf_shapes(geometry)
    return sum(prod(shape) for shape in shapes) * stored.itemsize


def _report(
    output: Path, geometry: LlamaGeometry, stored: dtype, losses: Sequence[str] = ()
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
        losses=tuple(losses),
    )


def _restore_sidecars(folder: Path, checkpoint_dir: Path, hf_config: Path | None) -> None:
    generation = checkpoint_dir / GENERATION_CONFIG_NAME
    if hf_config and not generation.is_file():
        generation = hf_config / hf_folder.GENERATION_CONFIG
    if generation.is_file():
        shutil.copyfile(generation, folder / hf_folder.GENERATION_CONFIG)
    copied = hf_folder.copy_tokenizer(checkpoint_dir / TOKENIZER_DIR_NAME, folder)
    if hf_config and not copied:
        hf_folder.copy_tokenizer(hf_config, folder)
