"""How many tokens a text can have at most, from its size in bytes alone.

A document that is short even at this bound need not be tokenized to be known as short. The bounds hold
for tokenizers in which every token stands for at least one byte of the normalized text:

- SentencePiece BPE or unigram. A token covers one or more characters of the normalized text, or, with
  byte fallback, one byte of it. Without a normalization map the normalized text is the text, with
  spaces written as one symbol and one of them put before it: at most `size_bytes + 1` tokens. With a map
  (NFKC) a character may become longer, so there is no bound here.
- tiktoken: every token stands for bytes of the text: at most `size_bytes`.
- `tokenizer.json`, BPE over bytes (`ByteLevel`) without a normalizer: every byte becomes one symbol,
  and merges make fewer: at most `size_bytes`, one more if it puts a space before the text.
- `tokenizer.json`, BPE with byte fallback, and nothing but "prepend and replace the space": as
  SentencePiece.

Any other tokenizer has no bound; all its documents are tokenized.
"""

import json
from pathlib import Path
from typing import Any

from megatron_long.tokenizer.tiktoken_model import is_tiktoken
from megatron_long.tokenizer.tokenizer_files import tokenizer_file

SPACE = "▁"


def extra_tokens_bound(tokenizer: Path) -> int | None:
    """Return n such that a text of b bytes has at most b + n tokens, or None if no bound is known.

    Special tokens that the dataset adds (BOS, EOD) are not counted.
    """
    file = tokenizer_file(tokenizer)
    if file.suffix == ".json":
        return _bound_of_json(json.loads(file.read_text("utf-8")))
    content = file.read_bytes()
    if is_tiktoken(content):
        return 0
    return _bound_of_sentencepiece(content)


def _bound_of_sentencepiece(content: bytes) -> int | None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(content)
    # The space symbol must be one piece, else each space could become the three bytes of it.
    if processor.piece_to_id(SPACE) == processor.unk_id():
        return None
    # The map is the only part of a model that changes characters.
    spec = _model(content).normalizer_spec
    return None if spec.precompiled_charsmap or not spec.escape_whitespaces else 1


def _model(content: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(content)
    return model


def _bound_of_json(content: dict[str, Any]) -> int | None:
    model, normalizer = content.get("model") or {}, content.get("normalizer")
    splitter = content.get("pre_tokenizer")
    if model.get("type", "BPE") != "BPE":
        return None
    if normalizer is None and _is_byte_level(splitter):
        return 1
    known = normalizer is None or _keeps_bytes(normalizer)
    fallback = model.get("byte_fallback") and SPACE in (model.get("vocab") or {})
    if known and fallback and (splitter is None or splitter.get("type") == "Metaspace"):
        return 2 if normalizer is not None and splitter is not None else 1
    return None


def _is_byte_level(splitter: dict[str, Any] | None) -> bool:
    """Return whether every token consists of bytes and at most one space is added in total."""
    if splitter is None:
        return False
    if splitter.get("type") == "ByteLevel":
        return True
    parts = splitter.get("pretokenizers") or []
    # A prefix space after a split would be added to each part.
    return (
        splitter.get("type") == "Sequence"
        and bool(parts)
        and parts[-1].get("type") == "ByteLevel"
        and not parts[-1].get("add_prefix_space", True)
        and all(
            part.get("type") in ("Split", "Digits") and part.get("behavior") != "Removed"
            for part in parts[:-1]
        )
    )


def _keeps_bytes(normalizer: dict[str, Any]) -> bool:
    parts = normalizer.get("normalizers") if normalizer.get("type") == "Sequence" else [normalizer]
    prepended = 0
    for part in parts or []:
        if part.get("type") == "Prepend" and part.get("prepend") == SPACE:
            prepended += 1
        elif not (
            part.get("type") == "Replace"
            and part.get("pattern") == {"String": " "}
            and part.get("content") == SPACE
        ):
            return False
    return prepended <= 1
