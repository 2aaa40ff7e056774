"""A SentencePiece BPE model as the `tokenizer.json` that fast engines read.

Only models whose ids such a file can give exactly are written: BPE with byte fallback and no
normalization but the leading space (Llama 1 and 2, Mistral, this project's demo). Anything else is
refused with a reason, and SentencePiece itself is used.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any


class NotConvertible(Exception):
    """The model has a feature that a `tokenizer.json` cannot represent exactly."""


@functools.lru_cache(maxsize=1)  # takes a third of a second, and a process opens it more than once
def sentencepiece_to_json(model_proto: bytes) -> str:
    """Write a SentencePiece model as `tokenizer.json`, without its control pieces as added tokens.

    A literal `</s>` in a text therefore stays text.

    Args:
        model_proto: Bytes of the `.model` file.
    Raises: NotConvertible: the file cannot represent the model.
    Source: SpmConverter of transformers 5.23 (conversion of Llama's slow tokenizer).
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(model_proto)
    _check_convertible(model)
    types, pieces = [piece.type for piece in model.pieces], [piece.piece for piece in model.pieces]
    kinds = type(model.pieces[0])
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == kinds.NORMAL}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = [{"type": "Prepend", "prepend": "▁"}] if model.normalizer_spec.add_dummy_prefix else []
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, space]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[types.index(kinds.UNKNOWN)],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": find_merges(scores),
        },
    }
    return json.dumps(tokenizer, ensure_ascii=False)


def find_merges(scores: Mapping[str, float]) -> list[list[str]]:
    """List the pairs of pieces that join to a piece, the best piece first.

    SentencePiece takes the leftmost of equal pairs. If one piece has several pairs, or runs of
    spaces share one score as in Llama's vocabulary, the longer left half first is equivalent.

    Args:
        scores: The pieces that merging may use and make, with their scores.

    >>> find_merges({"ab": -1.0, "abab": -2.0, "aba": -3.0, "a": -4.0, "b": -5.0})
    [['a', 'b'], ['aba', 'b'], ['ab', 'ab'], ['ab', 'a']]
    """
    merges = []
    for piece, score in scores.items():
        for at in range(1, len(piece)):
            if piece[:at] in scores and piece[at:] in scores:
                merges.append((-score, -at, piece))
    return [[piece[:-left], piece[-left:]] for _, left, piece in sorted(merges)]


def _check_convertible(model: Any) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kinds = type(model.pieces[0]) if model.pieces else None
    made = [p for p in model.pieces if kinds and p.type == kinds.NORMAL and len(p.piece) > 1]
    scores = [piece.score for piece in made if set(piece.piece) != {"▁"}]
    rules = {
        "it is not a BPE model": trainer.model_type == type(trainer).BPE,
        "it has no byte fallback": trainer.byte_fallback,
        "it puts the space after words": not trainer.treat_whitespace_as_suffix,
        "it normalizes text": not normalizer.precompiled_charsmap,
        "it removes spaces": not normalizer.remove_extra_whitespaces,
        "it does not escape spaces": normalizer.escape_whitespaces,
        "it has user-defined or unused pieces": not kinds
        or all(p.type not in (kinds.USER_DEFINED, kinds.UNUSED) for p in model.pieces),
        "two of its pieces have one score": len(set(scores)) == len(scores),
    }
    broken = [reason for reason, holds in rules.items() if not holds]
    if broken:
        raise NotConvertible("; ".join(broken))
