"""What the evaluation tools check before any model is built."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_long.checkpoint.choosing import RELEASE
from megatron_long.checkpoint.hashes import check_sidecars
from megatron_long.checkpoint.opening import EVALUATION, Checkpoint, open_checkpoint
from megatron_long.checkpoint.sidecars import HF_CONFIG_NAME, TOKENIZER_DIR_NAME
from megatron_long.errors import ConfigError
from megatron_long.files import refuse_overwrite
from megatron_long.flags.argv import Argv

if TYPE_CHECKING:
    from megatron_long.tokenizer.tokenizer_types import Tokenizer

HF_FOLDER_CONFIG = "config.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint and what lies next to it."""

    path: Path
    iteration: str
    """Training iteration, "release" for a converted model, "hf" or "random"."""
    tokenizer: Path | None
    """File or folder of the model's tokenizer, where there is one."""
    hf_config: Path | None = None
    """File that describes the model in Hugging Face's words, where there is one."""
    vocab_size: int | None = None
    """Vocabulary without padding, where known."""
    max_positions: int | None = None
    """Longest context the model was made for, tokens, where known."""

    @property
    def checkpoint(self) -> Checkpoint | None:
        """Which of Megatron's checkpoints; None for other models."""
        if self.iteration in ("hf", "random"):
            return None
        return Checkpoint(self.path, None if self.iteration == RELEASE else int(self.iteration))

    def stop_ids(self) -> set[int]:
        """Give the tokens that end a text by the model's config; none where it names none."""
        config = json.loads(self.hf_config.read_text()) if self.hf_config is not None else {}
        named = config.get("eos_token_id")
        return set(named if isinstance(named, list) else [] if named is None else [named])

    @classmethod
    def of_config(cls, path: Path) -> CheckpointFolder:
        """A model that is nothing but a config, a Hugging Face folder or its config.json.

        Raises: ConfigError: there is none.
        """
        config = path / HF_FOLDER_CONFIG if path.is_dir() else path
        if not config.is_file():
            raise ConfigError(
                f"--hf-config {path} does not exist; give a Hugging Face folder or its config.json"
            )
        return cls(path, "random", _hf_tokenizer(config.parent), config, *_read_sizes(config))


def find_checkpoint(
    path: Path, megatron_argv: Sequence[str] = (), *, check_hashes: bool = True
) -> CheckpointFolder:
    """Look at a checkpoint folder without loading it.

    Args:
        megatron_argv: Flags for Megatron, among which may be `--ckpt-step`.
        check_hashes: Whether the files next to the checkpoints are compared with their hashes.
    Raises: ConfigError, DataError: see `open_checkpoint`; a file next to it is damaged.
    """
    step = Argv(megatron_argv).value("--ckpt-step")
    if step is not None and not step.isdecimal():
        raise ConfigError(f"--ckpt-step {step} is not an iteration; give a number")
    found = open_checkpoint(path, None if step is None else int(step), reader=EVALUATION)
    if check_hashes:
        check_sidecars(path)
    tokenizer, config = path / TOKENIZER_DIR_NAME, path / HF_CONFIG_NAME
    return CheckpointFolder(
        path,
        found.name,
        tokenizer if tokenizer.is_dir() else None,
        config if config.is_file() else None,
        *_read_sizes(config),
    )


def find_hf_folder(path: Path) -> CheckpointFolder:
    """Look at a Hugging Face folder without loading it.

    Raises: ConfigError: there is no config.json in it.
    """
    config = path / HF_FOLDER_CONFIG
    if not config.is_file():
        raise ConfigError(
            f"--checkpoint {path} holds no {HF_FOLDER_CONFIG}; with --backend hf give a folder that "
            "tools/convert_checkpoint.py megatron-to-hf wrote, or another Hugging Face model"
        )
    return CheckpointFolder(path, "hf", _hf_tokenizer(path), config, *_read_sizes(config))


def _hf_tokenizer(folder: Path) -> Path | None:
    has_one = any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    return folder if has_one else None


def _read_sizes(config: Path) -> tuple[int | None, int | None]:
    """Vocabulary and longest context that a Hugging Face config names."""
    if not config.is_file():
        return None, None
    try:
        content = json.loads(config.read_text())
        sizes = content.get("vocab_size"), content.get("max_position_embeddings")
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"{config} is not a JSON object; copy the model's config again"
        ) from error
    return sizes


def open_tokenizer(tokenizer: Path | None, checkpoint: CheckpointFolder) -> Tokenizer:
    """Open `--tokenizer`, or the one next to the checkpoint, and see that the model has its ids.

    Raises: ConfigError: neither is there, they differ, or the vocabulary is larger than the
        model's.
    """
    from megatron_long.tokenizer.loading import load_tokenizer

    path = tokenizer or checkpoint.tokenizer
    if path is None:
        raise ConfigError(
            f"--checkpoint {checkpoint.path} has no tokenizer in it (folder {TOKENIZER_DIR_NAME}/); say "
            "which tokenizer the model was trained with: --tokenizer FILE_OR_FOLDER"
        )
    if not path.exists():
        raise ConfigError(f"--tokenizer {path} does not exist; give a tokenizer file or folder")
    opened = load_tokenizer(path, "reference")
    if tokenizer is not None and checkpoint.tokenizer is not None:
        _check_same_vocabulary(
            load_tokenizer(checkpoint.tokenizer, "reference").vocabulary_sha256,
            opened.vocabulary_sha256,
            f"--tokenizer {tokenizer}",
            checkpoint,
        )
    check_vocab_size(opened.vocab_size, f"the tokenizer {path}", checkpoint)
    return opened


def check_dataset_vocabulary(
    vocab_size: int, sha256: str, dataset: Path, tokenizer: Path | None, ckpt: CheckpointFolder
) -> None:
    """Check that the dataset was made with the model's tokenizer, as far as that is known.

    Args:
        vocab_size, sha256: The manifest's.
        tokenizer: `--tokenizer`, or None for the one next to the checkpoint, if any.
    Raises: ConfigError: it was not.
    """
    check_vocab_size(vocab_size, f"--dataset {dataset}", ckpt)
    if tokenizer is not None or ckpt.tokenizer is not None:
        opened = open_tokenizer(tokenizer, ckpt)
        _check_same_vocabulary(opened.vocabulary_sha256, sha256, f"--dataset {dataset}", ckpt)


def check_vocab_size(vocab_size: int, what: str, checkpoint: CheckpointFolder) -> None:
    """Check that every token id has an embedding.

    Raises: ConfigError: it has not.
    """
    if checkpoint.vocab_size is not None and vocab_size > checkpoint.vocab_size:
        raise ConfigError(
            f"{what} has a vocabulary of {vocab_size}, --checkpoint {checkpoint.path} one of "
            f"{checkpoint.vocab_size}; use the tokenizer the model was trained with"
        )


def _check_same_vocabulary(
    expected: str, seen: str, what: str, checkpoint: CheckpointFolder
) -> None:
    if expected != seen:
        raise ConfigError(
            f"{what} has another vocabulary (sha256 {seen[:12]}...) than the tokenizer of "
            f"--checkpoint {checkpoint.path} ({expected[:12]}...); use the tokenizer the model was "
            "trained with"
        )


def check_context_length(context_length: int, megatron_argv: Sequence[str]) -> None:
    """Check that context-parallel ranks can share a sequence evenly.

    One process alone takes any length.

    Raises: ConfigError: not a multiple of 2 * --context-parallel-size.
    """
    value = Argv(megatron_argv).value("--context-parallel-size") or "1"
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"--context-parallel-size {value} is not a positive integer; give one")
    tensor_parallel = Argv(megatron_argv).value("--tensor-model-parallel-size") or "1"
    step = 1 if value == tensor_parallel == "1" else 2 * int(value)
    if context_length < step or context_length % step:
        below = context_length // step * step
        choices = f"{below} or {below + step}" if below > 0 else f"{step} or more"
        raise ConfigError(
            f"--context-length {context_length} is not a multiple of 2 * --context-parallel-size "
            f"{value} ({step}); use {choices}"
        )


def check_output(path: Path, *, force: bool, flag: str) -> None:
    """Check that a result can be written, before hours are spent on it.

    Raises: ConfigError: the file exists and `force` is not given, or its folder is not writable.
    """
    refuse_overwrite(path, force=force, flag=flag)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{flag} {path} cannot be written as a file; give another path")


def positive_int(text: str) -> int:
    """Read a flag's value that must be at least 1; for argparse's `type`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value
