"""Convert a Hugging Face folder or a GGUF file to a Megatron checkpoint; `export` is the reverse.

Every tensor is read when it is needed and freed when it is written, so that memory holds one, never
the model. Output is written atomically.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_long.checkpoint.choosing import RELEASE
from megatron_long.checkpoint.hashes import (
    files_within,
    hash_files,
    write_hashes,
    write_sidecar_hashes,
)
from megatron_long.checkpoint.megatron_folder import common_state, extra_states
from megatron_long.checkpoint.sidecars import (
    GENERATION_CONFIG_NAME,
    HF_CONFIG_NAME,
    TOKENIZER_DIR_NAME,
    TRACKER_NAME,
)
from megatron_long.checkpoint.stored import read_ahead
from megatron_long.conversion.checks import check_folders, check_hf_tensors, choose_hf_dtype
from megatron_long.conversion.formats import hf_folder, sources
from megatron_long.conversion.options import ConversionReport, Options, Progress, make_report
from megatron_long.conversion.pieces import read_source, size_of
from megatron_long.conversion.stretch import Stretch
from megatron_long.conversion.verify import verify_output
from megatron_long.files import atomic_path
from megatron_long.hashing import FileInfo
from megatron_long.model.geometry import LlamaGeometry
from megatron_long.model.mapping import Unit, checkpoint_shape, megatron_shape, units_of

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from megatron_long.checkpoint.torch_dist_writer import LazyPiece

_log = logging.getLogger(__name__)


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
    Raises: ConfigError, DataError: the message says what is wrong; no output is left.
    """
    from megatron_long.checkpoint.torch_dist import TorchDistReader

    options = options or Options()
    check_folders(input_path, output_dir, force=options.force)
    config = sources.read_config(input_path)
    geometry = (stretch or Stretch()).apply(sources.read_source_geometry(input_path))
    geometry.to_argv()  # refuses a base that no Megatron flag can carry
    for warning in sources.check_model_tokenizer(input_path):
        _log.warning("%s; it is copied as it is", warning)
    with sources.open_weights(input_path, allow_pickle=options.allow_pickle) as weights:
        check_hf_tensors(weights, geometry)
        stored = choose_hf_dtype(weights, geometry, options.dtype)
        report = make_report(output_dir, geometry, stored, sources.losses(input_path))
        if options.dry_run:
            return report
        with atomic_path(output_dir, directory=True) as folder:
            hashed = write_release(
                folder,
                geometry,
                stored,
                partial(read_source, weights=weights, stored=stored),
                lambda unit, found: unit.rule.layout.to_megatron([t for _, t in found], geometry),
                options.progress,
            )
            hf_folder.write_config(folder / HF_CONFIG_NAME, config, geometry, stored)
            sources.copy_generation_config(input_path, folder / GENERATION_CONFIG_NAME)
            sources.copy_model_tokenizer(input_path, folder / TOKENIZER_DIR_NAME)
            report = verify_output(
                report,
                folder,
                TorchDistReader(folder / RELEASE),
                weights,
                stored,
                options,
                is_import=True,
                is_stretched=stretch not in (None, Stretch()),
            )
            write_hashed(folder, hashed)
    return report


def write_hashed(folder: Path, hashed: dict[str, FileInfo]) -> None:
    """Write the hashes of a checkpoint of converted weights, the last of its files.

    Args:
        hashed: What `write_release` returned.
    """
    release = folder / RELEASE
    others = [name for name in files_within(release) if name not in hashed]
    write_hashes(release, hashed | hash_files(release, others))
    write_sidecar_hashes(folder, RELEASE)


def write_release[Found](
    folder: Path,
    geometry: LlamaGeometry,
    stored: dtype,
    read: Callable[[Unit], Found],
    to_megatron: Callable[[Unit, Found], Tensor],
    progress: Progress,
) -> dict[str, FileInfo]:
    """Write the checkpoint of converted weights, one tensor or layer at a time.

    Args:
        folder: Of the checkpoints.
        stored: Type of the tensors.
        read: Reads a unit, in a separate thread.
        to_megatron: Makes Megatron's tensor of what was read.
    Returns: Size and hash of the files that hold the tensors, as they were written.
    """
    from megatron_long.checkpoint.torch_dist import COMMON_STATE
    from megatron_long.checkpoint.torch_dist_writer import write_torch_dist

    readings = read_ahead(
        units_of(geometry),
        read,
        partial(size_of, geometry=geometry, stored=stored),
    )

    def make(unit: Unit, shape: tuple[int, ...]) -> Tensor:
        read, found = next(readings)
        assert read == unit
        tensor = to_megatron(unit, found)
        progress(tensor.nbytes)
        return tensor.reshape(shape)

    pieces = [_plan_piece(unit, geometry, stored, make) for unit in units_of(geometry)]
    objects: dict[str, Any] = {
        **extra_states(geometry),
        COMMON_STATE: common_state(geometry, stored),
    }
    with closing(readings):
        written = write_torch_dist(folder / RELEASE, pieces, objects)
    (folder / TRACKER_NAME).write_text(RELEASE, encoding="utf-8")
    return written


def _plan_piece(
    unit: Unit,
    geometry: LlamaGeometry,
    stored: dtype,
    make: Callable[[Unit, tuple[int, ...]], Tensor],
) -> LazyPiece:
    from megatron_long.checkpoint.torch_dist_writer import LazyPiece

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
