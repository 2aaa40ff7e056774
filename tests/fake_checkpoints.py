"""Checkpoint folders that pass for whole ones as long as nobody reads a tensor; what model one holds."""

import json
from pathlib import Path

from megatron_long.checkpoint.choosing import INDEX_NAME, METADATA_NAME, iteration_folder
from megatron_long.checkpoint.megatron_folder import find_iteration, merge_geometry
from megatron_long.checkpoint.sidecars import HF_CONFIG_NAME, TRACKER_NAME
from megatron_long.checkpoint.torch_dist import read_common_state
from megatron_long.model.geometry import LlamaGeometry, geometry_from_hf


def write_fake_checkpoint(folder: Path, iteration: int | None) -> Path:
    """Make the smallest checkpoint that is chosen, and the tracker file that names it.

    A checkpoint has both files of metadata (`checkpoint.choosing.has_metadata`); this one has no tensors and
    no hashes, as one of another program.

    Args:
        folder: The common folder, made where it is missing.
        iteration: None for converted weights (`release`).
    Returns: The checkpoint's own folder.
    """
    path = iteration_folder(folder, iteration)
    path.mkdir(parents=True, exist_ok=True)
    (path / METADATA_NAME).write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (path / INDEX_NAME).write_bytes(b"index")
    (folder / TRACKER_NAME).write_text("release" if iteration is None else str(iteration))
    return path


def read_geometry(folder: Path) -> LlamaGeometry:
    """Give the shape of the model in a folder of real checkpoints, RoPE base as trained."""
    iteration = find_iteration(folder)
    described = geometry_from_hf(folder / HF_CONFIG_NAME)
    return merge_geometry(described, read_common_state(iteration), iteration)
