"""Sources of a model: a Hugging Face folder (safetensors, or pickles on request) or a GGUF file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatron_long.conversion.formats import gguf_file, hf_folder, pickle_folder
from megatron_long.conversion.formats.weights import Weights
from megatron_long.errors import ConfigError
from megatron_long.model.geometry import CONFIG_NAME, LlamaGeometry, geometry_from_config
from megatron_long.model.geometry import read_hf_config as read_config_file
from megatron_long.tokenizer.tokenizer_files import copy_files


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file."""
    return path.suffix == gguf_file.SUFFIX


def read_config(path: Path) -> dict[str, Any]:
    """Return the Hugging Face configuration of a model folder, a `config.json` or a GGUF file.

    Raises: ConfigError, DataError: it is missing, broken, or not of a known family.
    """
    if is_gguf(path):
        return gguf_file.read_gguf_config(path)
    return read_config_file(path / CONFIG_NAME if path.is_dir() else path)


def read_source_geometry(path: Path) -> LlamaGeometry:
    """Return the shape of the model that `read_config` describes."""
    name = path / CONFIG_NAME if path.is_dir() else path
    return geometry_from_config(read_config(path), name=str(name))


def open_weights(path: Path, *, allow_pickle: bool = False) -> Weights:
    """Open the weights of a model folder or a GGUF file.

    Args:
        path: The folder or file.
        allow_pickle: Whether pickled weights may be read where there are no safetensors.
    Raises: ConfigError: there are none, or only pickles.
        DataError: a file is missing or damaged.
    """
    if is_gguf(path):
        return gguf_file.GgufWeights(path)
    safe = (path / hf_folder.SINGLE_FILE, path / hf_folder.INDEX_FILE)
    pickles = sorted(file.name for file in path.glob("*.bin"))
    if not pickles or any(file.is_file() for file in safe):
        return hf_folder.HfWeights(path)
    if not allow_pickle:
        raise ConfigError(
            f"{path} holds only pickled weights ({', '.join(pickles[:3])}), and a pickle can run code; "
            "use the model's safetensors files, or read the pickles as plain tensors with "
            "--allow-pickle of tools/convert_checkpoint.py"
        )
    return pickle_folder.PickleWeights(path)


def copy_model_tokenizer(path: Path, folder: Path) -> list[str]:
    """Put the tokenizer of a model folder or GGUF file into a folder.

    Returns: Names of the files; none if the model has no tokenizer.
    """
    if is_gguf(path):
        from megatron_long.conversion.formats.gguf_tokenizer import write_tokenizer

        return write_tokenizer(path, folder)
    return copy_files(path, folder)


def check_model_tokenizer(path: Path) -> list[str]:
    """Look at the tokenizer files of a model folder: see `check_tokenizer`."""
    from megatron_long.tokenizer.loading import check_tokenizer

    return [] if is_gguf(path) else check_tokenizer(path)


def copy_generation_config(path: Path, target: Path) -> None:
    """Copy a model folder's generation settings, if it has some."""
    source = path / hf_folder.GENERATION_CONFIG
    if source.is_file():
        shutil.copyfile(source, target)


def losses(path: Path) -> list[str]:
    """Describe what the source has lost of the original model."""
    return gguf_file.losses(path) if is_gguf(path) else []
