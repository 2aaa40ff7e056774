"""Write a Hugging Face folder from a Megatron checkpoint saved in any layout, or from a GGUF file.

Memory holds one tensor, never the model; output is written atomically.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_long.checkpoint.choosing import check_whole
from megatron_long.checkpoint.hashes import HASHES_NAME, check_sidecars
from megatron_long.checkpoint.megatron_folder import (
    check_same_rope,
    check_tensors,
    describe_weights,
    find_weights,
    merge_geometry,
)
from megatron_long.checkpoint.opening import CONVERSION, open_checkpoint
from megatron_long.checkpoint.sidecars import (
    GENERATION_CONFIG_NAME,
    HF_CONFIG_NAME,
    TOKENIZER_DIR_NAME,
)
from megatron_long.checkpoint.stored import read_ahead
from megatron_long.conversion.checks import (
    KEEP,
    check_folders,
    check_hf_tensors,
    choose_hf_dtype,
    choose_megatron_dtype,
)
from megatron_long.conversion.formats import hf_folder, sources
from megatron_long.conversion.options import ConversionReport, Options, make_report
from megatron_long.conversion.pieces import read_checkpoint, read_source, size_of
from megatron_long.conversion.stretch import Stretch
from megatron_long.conversion.verify import compare_tensors, verify_output, write_verification
from megatron_long.errors import ConfigError
from megatron_long.files import atomic_path
from megatron_long.model.geometry import (
    CONFIG_NAME,
    LlamaGeometry,
    geometry_from_config,
    read_hf_config,
)
from megatron_long.model.mapping import Unit, units_of
from megatron_long.tokenizer.tokenizer_files import copy_files

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from megatron_long.checkpoint.torch_dist import TorchDistReader

_log = logging.getLogger(__name__)


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

    The optimizer's state is skipped, except its main copy of FP8 parameters. RoPE and the longest
    context are those of training.

    Args:
        input_dir: The checkpoint folder (Megatron's `--save`).
        output_dir: The model folder to write.
        iteration: Which iteration; the latest if None.
        hf_config: Model folder whose `config.json`, and tokenizer if the checkpoint has none, to
            use instead of the checkpoint's own.
        weights: One of `WEIGHTS`.
        stretch: RoPE and context that the user expects; refused if training used others.
        options: See `Options`.
    Raises: ConfigError, DataError: the message says what is wrong; no output is left.
    """
    from megatron_long.checkpoint.torch_dist import TorchDistReader, read_common_state

    options = options or Options()
    source = open_checkpoint(input_dir, iteration, reader=CONVERSION).path
    check_folders(input_dir, output_dir, force=options.force)
    is_hashed = not options.check_hashes or check_source(input_dir, source, hf_config)
    TorchDistReader(source)  # its files exist, before any other message about it
    state = read_common_state(source)
    config, geometry = trained_model(input_dir, source, state, hf_config, stretch or Stretch())
    prefix = find_weights(state, weights, source)
    taken = describe_weights(prefix, state)
    reader = TorchDistReader(source, prefix=prefix, check_bytes=options.verify or not is_hashed)
    check_tensors(reader, geometry)
    stored = choose_dtype(reader, geometry, state, options)
    report = replace(make_report(output_dir, geometry, stored), weights=taken)
    if options.dry_run:
        return report
    read = partial(read_checkpoint, reader=reader, geometry=geometry, stored=stored)
    with atomic_path(output_dir, directory=True) as folder:
        _write_hf(folder, read, geometry, stored, options)
        hf_folder.write_config(folder / CONFIG_NAME, config, geometry, stored)
        _restore_sidecars(folder, input_dir, hf_config)
        if not (options.verify or options.check_logits):
            return report
        with hf_folder.HfWeights(folder) as written:
            check_hf_tensors(written, geometry)
            return verify_output(report, folder, reader, written, stored, options, is_import=False)


def check_source(input_dir: Path, source: Path, hf_config: Path | None) -> bool:
    """Compare the files with their hashes, if there are any; else log what is checked without them."""
    if hf_config is None:
        check_sidecars(input_dir)
    if check_whole(source):
        return True
    _log.warning(
        "%s has no %s: each tensor is compared with the checksum that torch stored with it, but changes "
        "to its index (%s) and to files next to the checkpoint (%s, %s) are not detected",
        source,
        HASHES_NAME,
        ".metadata",
        HF_CONFIG_NAME,
        TOKENIZER_DIR_NAME,
    )
    return False


def choose_dtype(
    reader: TorchDistReader, geometry: LlamaGeometry, state: dict[str, Any], options: Options
) -> dtype:
    """Return the type to store; main copies are float32, of a model that was trained in another type."""
    wanted = options.dtype
    if reader.prefix and wanted == KEEP:
        wanted = str(state["args"].params_dtype).removeprefix("torch.")
    return choose_megatron_dtype(reader, geometry, wanted)


def gguf_to_hf(
    input_path: Path, output_dir: Path, *, options: Options | None = None
) -> ConversionReport:
    """Write a Hugging Face folder from a GGUF file, weights dequantized.

    Args:
        input_path: The file.
        output_dir: The model folder to write.
        options: See `Options`; logits are not compared, as there is one model only.
    Raises: ConfigError, DataError: the message says what is wrong; no output is left.
    """
    options = options or Options()
    check_folders(input_path, output_dir, force=options.force)
    if not sources.is_gguf(input_path):
        raise ConfigError(f"--input {input_path} is not a GGUF file (its name must end in .gguf)")
    config, geometry = sources.read_config(input_path), sources.read_source_geometry(input_path)
    with sources.open_weights(input_path) as weights:
        check_hf_tensors(weights, geometry)
        stored = choose_hf_dtype(weights, geometry, options.dtype)
        report = make_report(output_dir, geometry, stored, sources.losses(input_path))
        if options.dry_run:
            return report
        read = partial(read_source, weights=weights, stored=stored)
        with atomic_path(output_dir, directory=True) as folder:
            _write_hf(folder, read, geometry, stored, options)
            hf_folder.write_config(folder / CONFIG_NAME, config, geometry, stored)
            sources.copy_model_tokenizer(input_path, folder)
            if not options.verify:
                return report
            with hf_folder.HfWeights(folder) as written:
                back = partial(read_source, weights=written, stored=stored)
                hashes = compare_tensors(units_of(geometry), back, read, options.progress)
            write_verification(folder, hashes, None)
    return replace(report, is_verified=True)


def trained_model(
    input_dir: Path, source: Path, state: dict[str, Any], hf_config: Path | None, stretch: Stretch
) -> tuple[dict[str, Any], LlamaGeometry]:
    """Return the model's original configuration, and its shape with the RoPE of training."""
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


def _write_hf(
    folder: Path,
    read: Callable[[Unit], list[tuple[str, Tensor]]],
    geometry: LlamaGeometry,
    stored: dtype,
    options: Options,
) -> None:
    units = list(units_of(geometry))
    size = partial(size_of, geometry=geometry, stored=stored)

    def tensors() -> Generator[tuple[str, Tensor]]:
        with closing(read_ahead(units, read, size)) as readings:
            for unit, found in readings:
                yield from found
                found.clear()  # before the next is waited for
                options.progress(size(unit))

    shards = [
        [
            hf_folder.PlannedTensor(name=name, shape=shape, dtype=stored)
            for number in numbers
            for name, shape in _hf_shapes(units[number], geometry)
        ]
        for numbers in hf_folder.plan_shards(list(map(size, units)), options.max_shard_bytes)
    ]
    with closing(tensors()) as converted:
        hf_folder.write_weights(folder, shards, converted)


def _hf_shapes(unit: Unit, geometry: LlamaGeometry) -> list[tuple[str, tuple[int, ...]]]:
    return list(zip(unit.hf_names, unit.rule.layout.hf_shapes(geometry), strict=True))


def _restore_sidecars(folder: Path, checkpoint_dir: Path, hf_config: Path | None) -> None:
    generation = checkpoint_dir / GENERATION_CONFIG_NAME
    if hf_config and not generation.is_file():
        generation = hf_config / hf_folder.GENERATION_CONFIG
    if generation.is_file():
        shutil.copyfile(generation, folder / hf_folder.GENERATION_CONFIG)
    copied = copy_files(checkpoint_dir / TOKENIZER_DIR_NAME, folder)
    if hf_config and not copied:
        copy_files(hf_config, folder)
