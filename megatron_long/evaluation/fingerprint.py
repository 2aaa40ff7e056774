"""Which weights lie in a folder, without reading them: another model at the same path is told apart.

A checkpoint of this package is known by its `hashes.json`, wherever it is copied to. Weights without hashes
are known by names, sizes and times of change, so that a copy that does not keep the times counts as another
model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from megatron_long.checkpoint.choosing import RELEASE, iteration_folder
from megatron_long.checkpoint.hashes import HASHES_NAME
from megatron_long.evaluation.input_checks import CheckpointFolder

HF_GENERATION_CONFIG = "generation_config.json"
HF_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


def fingerprint(model: CheckpointFolder) -> str:
    """Give a SHA-256 of what tells a model from another one in the same place."""
    known: list[Any] = [] if model.hf_config is None else [sha256_of(model.hf_config)]
    if model.iteration == "hf":
        generation = model.path / HF_GENERATION_CONFIG
        known += [sha256_of(generation)] if generation.is_file() else []
        weights = (path for path in model.path.iterdir() if path.name.endswith(HF_WEIGHT_SUFFIXES))
        known += _listed(weights)
    elif model.iteration != "random":
        number = None if model.iteration == RELEASE else int(model.iteration)
        folder = iteration_folder(model.path, number)
        hashes = folder / HASHES_NAME
        known += [sha256_of(hashes)] if hashes.is_file() else _listed(folder.rglob("*"))
    return sha256(json.dumps(known).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Give the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _listed(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Name, size in bytes and time of change in nanoseconds of each file, in order."""
    files = sorted(path for path in paths if path.is_file())
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
