"""A Hugging Face tokenizer from a GGUF file's header.

The header holds the vocabulary, the merges or scores, and the name of a pre-tokenization rule;
the rules are those of the models' own `tokenizer.json` files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_long.conversion.formats.gguf_file import metadata, open_gguf
from megatron_long.errors import ConfigError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_RULES: dict[str, dict[str, Any]] = {
    "llama-bpe": {"pattern": rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"},
    "qwen2": {"pattern": rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}", "normalizes": True},
    "smollm": {"cuts_digits": True},
    "gpt-2": {},
}
"""Pre-tokenization rules of byte-level BPE, by `tokenizer.ggml.pre`."""

_CONTROL, _USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type` for tokens that no merge produces."""


def write_tokenizer(path: Path, folder: Path) -> list[str]:
    """Write the tokenizer of a GGUF file as Hugging Face's files.

    Args:
        path: The GGUF file.
        folder: Where to write; created if missing.
    Returns: Names of the files; none if the file holds no tokenizer.
    Raises: ConfigError: unknown kind of tokenizer, or unknown pre-tokenization rule.
    """
    values = metadata(open_gguf(path))
    kind = values.get("tokenizer.ggml.model")
    if kind is None:
        return []
    if kind not in ("gpt2", "llama"):
        raise ConfigError(
            f"{path}: tokenizer {kind!r} is not known; known: gpt2 (byte-level BPE), llama "
            "(SentencePiece): give the model's Hugging Face folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "gpt2":
        name = "tokenizer.json"
        _byte_level(path, values).save(str(folder / name))
    else:
        name = "tokenizer.model"
        (folder / name).write_bytes(_sentencepiece(values))
    settings = json.dumps(_settings(values, kind), indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    return [name, "tokenizer_config.json"]


def _byte_level(path: Path, values: Mapping[str, Any]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
    from tokenizers import pre_tokenizers as cut

    pre = str(values.get("tokenizer.ggml.pre"))
    if pre not in _RULES:
        raise ConfigError(
            f"{path}: unknown pre-tokenization rule {pre!r}; known: {', '.join(_RULES)}: "
            "give the model's Hugging Face folder"
        )
    rule = _RULES[pre]
    tokens = values["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in values["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe")
    )
    first: list[Any] = []
    if "pattern" in rule:
        first = [cut.Split(Regex(rule["pattern"]), "isolated")]
    elif rule.get("cuts_digits"):
        first = [cut.Digits(individual_digits=True)]
    byte_level = cut.ByteLevel(add_prefix_space=False, use_regex="pattern" not in rule)
    tokenizer.pre_tokenizer = cut.Sequence([*first, byte_level])
    if rule.get("normalizes"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    types = values.get("tokenizer.ggml.token_type", [])
    for token, kind in zip(tokens, types, strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            added = AddedToken(token, special=kind == _CONTROL, normalized=False)
            tokenizer.add_special_tokens([added]) if added.special else tokenizer.add_tokens(
                [added]
            )
    bos = values.get("tokenizer.ggml.bos_token_id")
    if values.get("tokenizer.ggml.add_bos_token") and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A {tokens[bos]} $B",
            special_tokens=[(tokens[bos], bos)],
        )
    return tokenizer


def _sentencepiece(values: Mapping[str, Any]) -> bytes:
    """Rebuild a SentencePiece model; its piece types are GGUF's token types."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    for name, word in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = values.get(f"tokenizer.ggml.{word}_token_id")
        setattr(model.trainer_spec, f"{name}_id", -1 if number is None else number)
    tokens = values["tokenizer.ggml.tokens"]
    model.trainer_spec.vocab_size = len(tokens)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(model.trainer_spec, f"{name}_id")
        if number >= 0:
            setattr(model.trainer_spec, f"{name}_piece", tokens[number])
    prefix = values.get("tokenizer.ggml.add_space_prefix", True)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(prefix)
    removes = values.get("tokenizer.ggml.remove_extra_whitespaces", False)
    model.normalizer_spec.remove_extra_whitespaces = bool(removes)
    charsmap = values.get("tokenizer.ggml.precompiled_charsmap")
    if charsmap:
        model.normalizer_spec.precompiled_charsmap = bytes(charsmap)
    columns = (tokens, values["tokenizer.ggml.scores"], values["tokenizer.ggml.token_type"])
    for token, score, kind in zip(*columns, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    return bytes(model.SerializeToString())


def _settings(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    tokens = values["tokenizer.ggml.tokens"]
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast" if kind == "gpt2" else "LlamaTokenizer",
        "add_bos_token": bool(values.get("tokenizer.ggml.add_bos_token", kind == "llama")),
        "add_eos_token": bool(values.get("tokenizer.ggml.add_eos_token", False)),
        "clean_up_tokenization_spaces": False,
    }
    words = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, word in words.items():
        number = values.get(f"tokenizer.ggml.{word}_token_id")
        if number is not None:
            settings[f"{name}_token"] = tokens[number]
    if "tokenizer.chat_template" in values:
        settings["chat_template"] = values["tokenizer.chat_template"]
    return settings
