"""The average of several checkpoints' weights, as a checkpoint of converted weights.

One tensor, or layer of one, is read from all checkpoints and written before the next: memory never holds a
model. Export rearranges values and computes nothing, so the export of the average is the average of the
exports.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_long.checkpoint.megatron_folder import check_tensors, describe_weights, find_weights
from megatron_long.checkpoint.opening import CONVERSION, open_checkpoint, split_checkpoint
from megatron_long.checkpoint.sidecars import (
    HF_CONFIG_NAME,
    TOKENIZER_DIR_NAME,
    copy_generation_config,
    write_run,
)
from megatron_long.conversion.checks import check_finite, check_folders
from megatron_long.conversion.convert import write_hashed, write_release
from megatron_long.conversion.export import check_source, choose_dtype, trained_model
from megatron_long.conversion.formats import hf_folder
from megatron_long.conversion.options import ConversionReport, Options, make_report
from megatron_long.conversion.stretch import Stretch
from megatron_long.differences import differences, format_differences
from megatron_long.errors import ConfigError
from megatron_long.files import atomic_path
from megatron_long.model.geometry import LlamaGeometry
from megatron_long.model.mapping import Unit

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from megatron_long.checkpoint.torch_dist import TorchDistReader


@dataclass(frozen=True)
class Source:
    """One of the checkpoints."""

    path: Path
    """Its own folder."""
    config: dict[str, Any]
    """The model's original configuration."""
    geometry: LlamaGeometry
    reader: TorchDistReader
    stored: dtype
    """Of its export."""
    weights: str
    """Which of its weights, if it has two kinds."""


def average_checkpoints(
    inputs: Sequence[Path],
    output_dir: Path,
    *,
    weights: str = "auto",
    options: Options | None = None,
) -> ConversionReport:
    """Write the mean of the weights of checkpoints, added in float64 and rounded once to the type stored.

    Args:
        inputs: Folders of checkpoints (the newest of each is used) or single ones (`iter_0000100`).
        output_dir: The checkpoint folder to write, for `--pretrained-checkpoint`, evaluation and export.
        weights: One of `WEIGHTS`.
        options: `dtype`, `force`, `dry_run`, `check_hashes` and `progress` of `Options`.
    Raises: ConfigError, DataError: fewer than two checkpoints, or of different models; no output is left.
    """
    options = options or Options()
    for path in inputs:
        check_folders(path, output_dir, force=options.force)
    sources = [_open(path, weights, options) for path in inputs]
    _check_alike(sources)
    first = sources[0]
    stored = first.stored
    report = make_report(output_dir, first.geometry, stored)
    report = replace(report, weights=first.weights)
    if options.dry_run:
        return report
    folder_of_first = first.path.parent
    with atomic_path(output_dir, directory=True) as folder:
        hashed = write_release(
            folder,
            first.geometry,
            stored,
            partial(_mean, readers=[source.reader for source in sources], stored=stored),
            lambda unit, tensor: tensor,
            options.progress,
        )
        hf_folder.write_config(folder / HF_CONFIG_NAME, first.config, first.geometry, stored)
        copy_generation_config(folder, folder_of_first)
        if (folder_of_first / TOKENIZER_DIR_NAME).is_dir():
            shutil.copytree(folder_of_first / TOKENIZER_DIR_NAME, folder / TOKENIZER_DIR_NAME)
        write_run(folder, {"argv": sys.argv[1:], "averaged": [str(item.path) for item in sources]})
        write_hashed(folder, hashed)
    return report


def _open(path: Path, weights: str, options: Options) -> Source:
    from megatron_long.checkpoint.torch_dist import TorchDistReader, read_common_state

    folder, iteration = split_checkpoint(path)
    found = open_checkpoint(folder, iteration, reader=CONVERSION).path
    is_hashed = not options.check_hashes or check_source(folder, found, None)
    state = read_common_state(found)
    config, geometry = trained_model(folder, found, state, None, Stretch())
    prefix = find_weights(state, weights, found)
    reader = TorchDistReader(found, prefix=prefix, check_bytes=not is_hashed)
    check_tensors(reader, geometry)
    stored = choose_dtype(reader, geometry, state, options)
    return Source(found, config, geometry, reader, stored, describe_weights(prefix, state))


def _check_alike(sources: Sequence[Source]) -> None:
    first, *others = sources
    paths = [source.path.resolve() for source in sources]
    if len(set(paths)) < max(len(paths), 2):
        raise ConfigError(
            f"--input names {len(set(paths))} different checkpoints; give two or more, each once"
        )
    for other in others:
        facts = [vars(item.geometry) | {"dtype": str(item.stored)} for item in (first, other)]
        if found := differences(*facts):
            listed = format_differences(found, pattern="{}: {} and {}")
            raise ConfigError(
                f"{first.path} and {other.path} are different models ({listed}): their weights have no mean; "
                "give checkpoints of one model"
                + (", or --dtype" if [item.name for item in found] == ["dtype"] else "")
            )


def _mean(unit: Unit, readers: Sequence[TorchDistReader], stored: dtype) -> Tensor:
    import torch

    key, total = unit.rule.megatron_key, None
    for reader in readers:
        tensor = reader.read(key, unit.layer)
        check_finite(tensor, f"{reader.folder}: tensor {key}")
        total = tensor.to(torch.float64) if total is None else total.add_(tensor)
    assert total is not None
    return total.div_(len(readers)).to(stored)
