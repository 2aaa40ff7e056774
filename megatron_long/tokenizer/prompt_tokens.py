"""Special tokens of a prompt: with a chat template, encoded as by the model's own tokenizer."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_long.errors import ConfigError, DataError
from megatron_long.tokenizer.tokenizer_files import (
    HF_FILE,
    SENTENCEPIECE_FILE,
    has_chat_template,
    read_config,
    token_text,
)
from megatron_long.tokenizer.tokenizer_types import Tokenizer, Tokens


def encode_prompt(tokenizer: Tokenizer, file: Path, text: str) -> Tokens:
    """Return the ids of a prompt; see `Tokenizer.encode_prompt`.

    Raises: ConfigError: special tokens are asked for, and nothing can encode them.
    """
    ids = encode_as_model(file, text)
    return tokenizer.encode(text) if ids is None else np.array(ids, np.int32)


def encode_as_model(file: Path, text: str) -> list[int] | None:
    """Return the ids of a prompt as `transformers` makes them from the tokenizer's folder.

    A SentencePiece or tiktoken model does not know the tokens that a chat model has added to it; they are
    in `tokenizer.json`, `added_tokens.json` or `added_tokens_decoder` of the configuration next to it.

    Args:
        file: The tokenizer's file. A JSON file of a name that `transformers` does not look for is read alone.
    Returns: None where the folder has no chat template, or the text none of its added tokens.
    Raises: ConfigError: `transformers` cannot open the folder, and there is no `tokenizer.json` either.
        DataError: a file that lists added tokens is damaged.
    """
    config = read_config(file.parent)
    json_file = file if file.suffix == ".json" else file.parent / HF_FILE
    if not has_chat_template(file.parent, config):
        return None
    stamp = _stamp(file.parent)
    if not any(token in text for token in _added_tokens(json_file, stamp)):
        return None
    if file.name in (HF_FILE, SENTENCEPIECE_FILE):
        try:
            own = _open_as_model(file.parent, stamp)
            return [int(index) for index in own(text, add_special_tokens=False).input_ids]
        except (
            Exception
        ) as error:  # a configuration of arbitrary content can raise nearly any exception
            if not json_file.is_file():
                raise ConfigError(
                    f"--tokenizer {file.parent} has a chat template, and transformers cannot open it to "
                    f"encode the special tokens of the prompt ({type(error).__name__}: {error}); put the "
                    f"model's tokenizer_config.json or {HF_FILE} there, or give --prompt plain"
                ) from error
    import tokenizers

    ids: list[int] = (
        tokenizers.Tokenizer.from_file(str(json_file)).encode(text, add_special_tokens=False).ids
    )
    return ids


def _stamp(folder: Path) -> tuple[tuple[str, int], ...]:
    """Names and times of change of the files: what is opened once holds while they stay the same."""
    return tuple(sorted((path.name, path.lstat().st_mtime_ns) for path in folder.iterdir()))


@lru_cache(maxsize=2)
def _open_as_model(folder: Path, stamp: object) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


@lru_cache(maxsize=2)
def _added_tokens(json_file: Path, stamp: object) -> tuple[str, ...]:
    """Texts of the tokens that were added to the vocabulary, from each file that may list them."""
    listed = list((read_config(json_file.parent).get("added_tokens_decoder") or {}).values())
    listed += _read_object(json_file).get("added_tokens") or []
    listed += _read_object(json_file.parent / "added_tokens.json")
    return tuple(token for token in map(token_text, listed) if token)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; copy the model's tokenizer again") from None
    if not isinstance(content, dict):
        raise DataError(
            f"{path} holds a {type(content).__name__}; it must be an object: copy the model's "
            "tokenizer again"
        )
    return content
