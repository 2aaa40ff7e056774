"""The files next to Megatron's checkpoints in their folder: HF config, tokenizer, command line.

DIR/latest_checkpointed_iteration.txt, DIR/iter_0000100/ or DIR/release/   Megatron's own
DIR/hf_config.json    the model as Hugging Face's config.json describes it, with the RoPE trained
DIR/hf_generation_config.json    that of the original model, if it has one
DIR/tokenizer/        the tokenizer's files
DIR/run.json          command line and dataset fingerprint of the run that writes here
DIR/hashes.json       hashes of the files above except Megatron's, and which checkpoint is the newest
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_long.errors import ConfigError
from megatron_long.files import atomic_path
from megatron_long.model.geometry import HF_CONFIG_NAME, LlamaGeometry

TRACKER_NAME = "latest_checkpointed_iteration.txt"
GENERATION_CONFIG_NAME = "hf_generation_config.json"
TOKENIZER_DIR_NAME = "tokenizer"
RUN_NAME = "run.json"
HF_MODEL_CONFIG = "config.json"
METADATA_NAME = "metadata.json"
"""In each of Megatron's checkpoints, next to their tensors."""
RELEASE_NAME = "release"


def no_checkpoint(
    folder: Path, flag: str, hf_remedy: str, step_flag: str = "--ckpt-step"
) -> ConfigError:
    """Return the error for a folder without a Megatron checkpoint, with a remedy that fits its content.

    Args:
        flag: The flag that names the folder.
        hf_remedy: What to do with a Hugging Face model.
        step_flag: The flag that selects one checkpoint of a folder.
    """
    number = re.fullmatch(r"iter_(\d+)", folder.name)
    if not folder.exists():
        reason = "does not exist; give the folder that a training run (--save) or"
    elif (folder / METADATA_NAME).exists() and (number or folder.name == RELEASE_NAME):
        step = f" {step_flag} {int(number[1])}" if number else ""
        return ConfigError(
            f"{flag} {folder} is a single checkpoint, and the folder of checkpoints is needed: give "
            f"{flag} {folder.parent}{step}"
        )
    elif (folder / HF_MODEL_CONFIG).is_file():
        return ConfigError(f"{flag} {folder} is a Hugging Face model folder; {hf_remedy}")
    else:
        reason = f"holds no Megatron checkpoint: {TRACKER_NAME} is missing; give the folder that a "
        reason += "training run (--save) or"
    return ConfigError(f"{flag} {folder} {reason} tools/convert_checkpoint.py hf-to-megatron wrote")


def hf_config_path(folder: Path) -> Path:
    """Where a checkpoint folder keeps the HF config of its model.

    Raises: ConfigError: it has none.
    """
    path = folder / HF_CONFIG_NAME
    if not path.is_file():
        raise ConfigError(
            f"checkpoint folder {folder} has no {HF_CONFIG_NAME}, which says what model it holds; copy "
            f"the config.json of the Hugging Face model there under that name"
        )
    return path


def write_hf_config(
    folder: Path, geometry: LlamaGeometry, original: Mapping[str, Any] | None
) -> None:
    """Write the HF config of what is trained.

    Args:
        geometry: The shape from the run's flags.
        original: The model's original config, for values that are not flags (token ids, for example).
    """
    _write_json(folder / HF_CONFIG_NAME, dict(original or {}) | geometry.to_hf_config())


def add_tokenizer(folder: Path, fill: Callable[[Path], object]) -> None:
    """Put a tokenizer's files next to the checkpoints, unless some are there.

    Args:
        fill: Writes the files, if there are any, into a folder.
    """
    target = folder / TOKENIZER_DIR_NAME
    if target.exists():
        return
    with atomic_path(target, directory=True) as temporary:
        fill(temporary)
    if not any(target.iterdir()):
        target.rmdir()


def copy_generation_config(folder: Path, source: Path) -> None:
    """Put another checkpoint folder's generation config next to the checkpoints, if it has one."""
    content = source / GENERATION_CONFIG_NAME
    if content.is_file() and not (folder / GENERATION_CONFIG_NAME).exists():
        with atomic_path(folder / GENERATION_CONFIG_NAME) as temporary:
            shutil.copyfile(content, temporary)


def write_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Record the run that writes checkpoints here."""
    _write_json(folder / RUN_NAME, run)


def _write_json(path: Path, value: object) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
