"""Verification of a conversion: every tensor bit by bit, hashed, and the logits of both models."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_long.checkpoint.megatron_folder import check_tensors
from megatron_long.checkpoint.sidecars import HF_CONFIG_NAME
from megatron_long.conversion.checks import check_same
from megatron_long.conversion.formats.weights import Weights
from megatron_long.conversion.options import ConversionReport, Options
from megatron_long.conversion.pieces import read_checkpoint, read_source
from megatron_long.errors import DataError
from megatron_long.model.geometry import (
    CONFIG_NAME,
    LlamaGeometry,
    geometry_from_hf,
    pad_vocab_size,
)
from megatron_long.model.mapping import Unit, units_of

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from megatron_long.checkpoint.torch_dist import TorchDistReader

VERIFICATION_NAME = "verification.json"
UnitTensors = Callable[[Unit], Iterable[tuple[str, "Tensor"]]]
"""Gives the Hugging Face tensors of a unit, by name."""


def hash_tensor(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes in row order, without name, shape or type."""
    import torch

    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()


def verify_output(
    report: ConversionReport,
    folder: Path,
    reader: TorchDistReader,
    weights: Weights,
    stored: dtype,
    options: Options,
    *,
    is_import: bool,
    is_stretched: bool = False,
) -> ConversionReport:
    """Compare the output in `folder` with its input, and write the result.

    Args:
        folder: The output.
        reader: The checkpoint, input or output.
        weights: The Hugging Face weights, output or input.
        is_import: Whether the checkpoint is the output.
        is_stretched: Whether the checkpoint is to be trained with other RoPE or context than the input's.
    Raises: DataError: names what differs.
    """
    geometry, logits = report.geometry, None
    if not (options.verify or options.check_logits):
        return report
    check_tensors(reader, geometry)
    megatron = partial(read_checkpoint, reader=reader, geometry=geometry, stored=stored)
    hugging_face = partial(read_source, weights=weights, stored=stored)
    both = (megatron, hugging_face) if is_import else (hugging_face, megatron)
    hashes = compare_tensors(units_of(geometry), *both, options.progress)
    if options.check_logits:
        compare = partial(
            compare_logits, reader, weights.location, stored, allow_pickle=options.allow_pickle
        )
        written = folder / (HF_CONFIG_NAME if is_import else CONFIG_NAME)
        if is_import:
            _check_config(written, geometry)
        given, found = weights.location / CONFIG_NAME, []  # the input's own, not a rewritten one
        if is_import and given.is_file():
            found.append(compare(given, rope_of_config=is_stretched))
        if not found or is_stretched:
            found.append(compare(written))
        logits = max(found)
    write_verification(folder, hashes, logits)
    return replace(report, is_verified=True, logits_difference=logits)


def compare_tensors(
    units: Iterable[Unit],
    read_written: UnitTensors,
    read_source: UnitTensors,
    progress: Callable[[int], object],
) -> dict[str, str]:
    """Read the output back and compare it with the input.

    Args:
        units: Every piece of the model.
        read_written: Reads a piece of the output.
        read_source: Reads a piece of the input, in the type that was written.
        progress: Called with the number of bytes just compared.
    Returns: SHA-256 of each Hugging Face tensor.
    Raises: DataError: names the first tensor that differs by a bit.
    """
    hashes: dict[str, str] = {}
    for unit in units:
        written = dict(read_written(unit))
        for name, expected in read_source(unit):
            check_same(written[name], expected, name)
            hashes[name] = hash_tensor(written[name])
            progress(expected.nbytes)
    return hashes


def compare_logits(
    reader: TorchDistReader,
    source: Path,
    stored: dtype,
    config: Path,
    *,
    allow_pickle: bool,
    rope_of_config: bool = False,
) -> float:
    """Compare the logits of a checkpoint, by Megatron, with those of transformers.

    Runs in a separate process, which computes in float32 on the host, a layer at a time: see
    `logits_check`.

    Args:
        reader: The checkpoint.
        source: Model folder or GGUF file with the Hugging Face weights.
        stored: The type in which both hold their weights, or would after conversion.
        config: The `config.json` that transformers reads.
        allow_pickle: See `sources.open_weights`.
        rope_of_config: Whether Megatron computes with what we read in `config`, not with the checkpoint's
            RoPE and context: those are not the input's where a model is stretched.
    Returns: The largest difference over the largest logit.
    Raises: DataError: the two disagree, or the check could not be made.
    """
    command = [sys.executable, "-m", "megatron_long.conversion.logits_check"]
    command += ["--iteration", str(reader.folder), "--prefix", reader.prefix]
    command += ["--source", str(source), "--config", str(config)]
    command += ["--dtype", str(stored).removeprefix("torch.")]
    command += ["--allow-pickle"] if allow_pickle else []
    command += ["--rope-of-config"] if rope_of_config else []
    environment = {
        **{name: value for name, value in os.environ.items() if name not in _JOB_VARIABLES},
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        words = (done.stderr.strip() or "no words").splitlines()
        raise DataError(f"--verify: the logits could not be compared ({' '.join(words[-3:])})")
    result = json.loads(lines[-1])
    difference, tolerance = result["relative_difference"], result["tolerance"]
    if not difference <= tolerance:
        raise DataError(
            f"--verify: the logits of Megatron and transformers differ by {difference:.1e} of the largest "
            f"logit (at most {tolerance:.0e} may be rounding), though every tensor is the same: transformers "
            f"reads another model from {config.name} than the checkpoint's arguments describe; no output was "
            "kept"
        )
    return float(difference)


def _check_config(path: Path, geometry: LlamaGeometry) -> None:
    """Training, evaluation and export read the model in this file."""
    if geometry_from_hf(path) != replace(
        geometry, padded_vocab_size=pad_vocab_size(geometry.vocab_size)
    ):
        raise DataError(f"--verify: {path.name} does not describe the converted model")


_JOB_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def write_verification(folder: Path, hashes: dict[str, str], logits: float | None) -> None:
    """Write what was verified next to the output."""
    record = {"sha256": hashes, "logits_relative_difference": logits}
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    (folder / VERIFICATION_NAME).write_text(text, encoding="utf-8")
