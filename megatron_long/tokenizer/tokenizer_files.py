"""The files of a tokenizer's folder: which one is the tokenizer, and the settings next to it."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_long.errors import ConfigError, DataError

SENTENCEPIECE_FILE = "tokenizer.model"
HF_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE_FILE,
)
MODEL_FILES = (HF_FILE, SENTENCEPIECE_FILE, *CONFIG_FILES, "vocab.json", "merges.txt")
"""Of a tokenizer, in the folder of a Hugging Face model."""


def tokenizer_file(path: Path) -> Path:
    """Find the tokenizer file that `path` (a file or a folder) stands for.

    Raises: ConfigError: there is none.
    """
    candidates = [path / SENTENCEPIECE_FILE, path / HF_FILE] if path.is_dir() else [path]
    for file in candidates:
        # Mistral's are called tokenizer.model.v1, tokenizer.model.v3.
        if file.is_file() and (file.suffix == ".json" or ".model" in file.suffixes):
            return file
    raise ConfigError(
        f"--tokenizer {path}: no tokenizer there; give a *.model file, a {HF_FILE}, or a "
        f"folder with {SENTENCEPIECE_FILE} or {HF_FILE}"
    )


def copy_tokenizer(path: Path, folder: Path) -> None:
    """Copy the tokenizer that `path` stands for into `folder`, so that `load_tokenizer(folder)` works."""
    file = tokenizer_file(path)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, folder / (HF_FILE if file.suffix == ".json" else SENTENCEPIECE_FILE))
    # Copy both forms: transformers reads settings from the JSON that a SentencePiece model lacks.
    both = (SENTENCEPIECE_FILE, HF_FILE) if path.is_dir() else ()
    copy_files(file.parent, folder, (*CONFIG_FILES, *both))


def copy_files(source: Path, target: Path, names: Sequence[str] = MODEL_FILES) -> list[str]:
    """Copy those files of a folder that exist; the target is created if there are any.

    Returns: Their names.
    """
    found = [name for name in names if (source / name).is_file()]
    for name in found:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return found


def has_chat_template(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a tokenizer's folder has a chat template, in a file of its own or in its configuration."""
    return (folder / CHAT_TEMPLATE_FILE).is_file() or bool(config.get("chat_template"))


def read_config(folder: Path) -> dict[str, Any]:
    """Return the settings in a tokenizer's folder, of all files that hold some."""
    merged: dict[str, Any] = {}
    for name in reversed(CONFIG_FILES):
        if name != CHAT_TEMPLATE_FILE and (folder / name).is_file():
            try:
                merged.update(json.loads((folder / name).read_text("utf-8")))
            except (ValueError, TypeError, RecursionError) as error:
                raise DataError(f"{folder / name} is not a JSON object: {error}") from None
    return merged


def token_text(token: Any) -> str | None:
    """Return the text of a token as configurations write it: a string, or an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def explain_no_bos(path: Path) -> str | None:
    """Say why a tokenizer without BOS has none, if its configuration names a `bos_token`; else None."""
    config = read_config(tokenizer_file(path).parent)
    bos = token_text(config.get("bos_token"))
    if bos is None:
        return None
    why = (
        "it is not in the vocabulary"
        if config.get("add_bos_token")
        else "the tokenizer does not add it; set add_bos_token to true there if the model needs it"
    )
    return f"documents get no BOS: tokenizer_config.json names the bos_token {bos!r}, but {why}"
