"""Both ends of a run in Hugging Face's format: weights to start from, and the model to leave behind."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_long.checkpoint.choosing import has_checkpoint
from megatron_long.checkpoint.sidecars import GENERATION_CONFIG_NAME, add_tokenizer
from megatron_long.conversion.checks import check_hf_tensors
from megatron_long.conversion.formats import sources
from megatron_long.tokenizer.tokenizer_files import HF_FILE, SENTENCEPIECE_FILE


def starts_from_hf(model: str | None, load: str | None) -> bool:
    """Whether a run begins with Hugging Face weights: the flag is given, and no checkpoint is resumed."""
    return model is not None and not has_checkpoint(load)


def first_weights(
    model: str | None, load: str | None, padded_vocab_size: Callable[[], int]
) -> Callable[[list], None] | None:
    """Return the function that fills the model chunks with Hugging Face weights; None without such a start.

    Args:
        padded_vocab_size: See `filler`.
    """
    if model is None or not starts_from_hf(model, load):
        return None
    return filler(Path(model), padded_vocab_size)


def check_weights(model: Path) -> None:
    """Check the headers of all weights, before a GPU is used.

    Raises: ConfigError, DataError: a file or tensor is missing, damaged or of another shape.
    """
    with sources.open_weights(model) as weights:
        check_hf_tensors(weights, sources.read_source_geometry(model))


def filler(model: Path, padded_vocab_size: Callable[[], int]) -> Callable[[list], None]:
    """Return the function that fills this rank's model chunks.

    Args:
        model: Hugging Face folder or GGUF file.
        padded_vocab_size: Returns the embedding rows of the model that is built, once they are known.
    """

    def fill(chunks: list) -> None:
        from megatron_long.conversion.straight_start import fill_model

        described = sources.read_source_geometry(model)
        geometry = replace(described, padded_vocab_size=padded_vocab_size())
        with sources.open_weights(model) as weights:
            fill_model(chunks, weights, geometry)

    return fill


def vocabulary_of(model: Path) -> str | None:
    """Return the fingerprint of the vocabulary of a model's tokenizer; None if it has no tokenizer."""
    from megatron_long.tokenizer.loading import load_tokenizer

    if not sources.is_gguf(model):
        has_tokenizer = any((model / name).is_file() for name in (HF_FILE, SENTENCEPIECE_FILE))
        return load_tokenizer(model, "reference").vocabulary_sha256 if has_tokenizer else None
    with tempfile.TemporaryDirectory() as folder:
        sources.copy_model_tokenizer(model, Path(folder))
        return load_tokenizer(Path(folder), "reference").vocabulary_sha256


def write_start_sidecars(folder: Path, model: Path) -> None:
    """Put the model's tokenizer and generation settings next to the checkpoints, unless some are there."""
    generation = folder / GENERATION_CONFIG_NAME
    add_tokenizer(folder, partial(sources.copy_model_tokenizer, model))
    if not generation.exists() and not sources.is_gguf(model):
        sources.copy_generation_config(model, generation)


def export(checkpoint_dir: Path, output: Path) -> Any:
    """Write the checkpoint saved last as a Hugging Face folder, as the offline conversion does.

    Returns: The conversion's report.
    """
    from megatron_long.conversion.export import megatron_to_hf

    return megatron_to_hf(checkpoint_dir, output)
