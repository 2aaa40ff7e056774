"""Llama-3's `tokenizer.model` as Meta ships it: a tiktoken file of ranks.

The file holds neither the pattern that divides text nor the special tokens; both are facts of the model.
Ids are those of the `tokenizer.json` of the same model.
"""

import base64
import binascii
import itertools
import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from megatron_long.errors import ConfigError, DataError
from megatron_long.tokenizer.prompt_tokens import encode_prompt
from megatron_long.tokenizer.tokenizer_types import (
    Tokens,
    TokensAndLengths,
    hash_vocabulary,
    join_ids,
    split_flat,
)

LLAMA3_RANKS = 128_000
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, EOD = "<|begin_of_text|>", "<|end_of_text|>"
NUM_SPECIAL = 256


def is_tiktoken(content: bytes) -> bool:
    """Return whether a file holds ranks (each line: a token in base64, a space, its rank).

    >>> is_tiktoken(b"IQ== 0\\nIg== 1\\n"), is_tiktoken(bytes([10, 14, 10, 5]) + b"<unk>")
    (True, False)
    """
    token, _, rank = content[:1000].partition(b"\n")[0].partition(b" ")
    try:
        return bool(base64.b64decode(token, validate=True)) and rank.strip().isdigit()
    except binascii.Error:
        return False


class TiktokenTokenizer:
    """Llama-3's ranks, with its pattern and its special tokens; BOS is added, as by its own tokenizer."""

    kind = "tiktoken"
    engine_name = "tiktoken"
    engine_notes: tuple[str, ...] = ()
    num_by_reference = 0

    def __init__(self, path: Path) -> None:
        try:
            import tiktoken
        except ImportError:
            raise ConfigError(
                f"--tokenizer {path} is a tiktoken file, which needs `pip install tiktoken`; or give the "
                "tokenizer.json of the same model"
            ) from None
        self.engine_version = version("tiktoken")
        self._path = path
        self._ranks = _read_ranks(path)
        count = len(self._ranks)
        self._special = {name: count + index for index, name in enumerate(_special_names())}
        self._encoding = tiktoken.Encoding(
            path.name,
            pat_str=LLAMA3_WORDS,
            mergeable_ranks=self._ranks,
            special_tokens=self._special,
        )
        self.vocab_size = count + NUM_SPECIAL
        self.bos_id: int | None = self._special[BOS]
        self.eod_id = self._special[EOD]
        self.vocabulary_sha256 = hash_vocabulary([*map(_written, self._ranks), *self._special])

    def encode(self, text: str) -> Tokens:
        return np.array(self._encoding.encode_ordinary(text), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        return split_flat(*self.encode_flat(texts))

    def encode_flat(self, texts: Sequence[str]) -> TokensAndLengths:
        return join_ids([self._encoding.encode_ordinary(text) for text in texts])

    def encode_prompt(self, text: str) -> Tokens:
        return encode_prompt(self, self._path, text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([int(index) for index in ids])

    def control_ids(self) -> dict[str, int]:
        return self._special

    def special_texts(self) -> list[str]:
        return list(self._special)

    def to_json(self) -> str:
        vocab = {_written(token): rank for token, rank in self._ranks.items()}
        words = [
            {
                "type": "Split",
                "pattern": {"Regex": LLAMA3_WORDS},
                "behavior": "Isolated",
                "invert": False,
            },
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": False,
            },
        ]
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": find_merges(self._ranks),
        }
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [_added(name, index) for name, index in self._special.items()],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": words},
            "post_processor": None,
            "decoder": words[1],
            "model": model,
        }
        return json.dumps(content, ensure_ascii=False)


def find_merges(ranks: dict[bytes, int]) -> list[list[str]]:
    """Return all pairs of tokens that make a token, in the order of its rank.

    tiktoken merges the two neighbors whose union has the lowest rank.

    >>> find_merges({b"a": 0, b"b": 1, b"ab": 2, b"aba": 3})
    [['a', 'b'], ['ab', 'a']]
    """
    merges = []
    for token, rank in ranks.items():
        for at in range(1, len(token)):
            left, right = ranks.get(token[:at]), ranks.get(token[at:])
            if left is not None and right is not None:
                merges.append((rank, left, right, token[:at], token[at:]))
    return [[_written(left), _written(right)] for *_, left, right in sorted(merges)]


def _read_ranks(path: Path) -> dict[bytes, int]:
    try:
        pairs = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise DataError(f"--tokenizer {path} is damaged ({error}); download it again") from None
    if list(ranks.values()) != list(range(LLAMA3_RANKS)):
        raise DataError(
            f"--tokenizer {path} is a tiktoken file of {len(ranks):,} ranks; of these only Llama 3's "
            f"({LLAMA3_RANKS:,}) is supported: give the tokenizer.json of the same model"
        )
    return ranks


def _special_names() -> list[str]:
    """Return Llama-3's special tokens; their ids follow the ranks."""
    named = {0: BOS, 1: EOD, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"}
    reserved = itertools.count()
    return [
        named.get(index) or f"<|reserved_special_token_{next(reserved)}|>"
        for index in range(NUM_SPECIAL)
    ]


def _letters() -> list[str]:
    """Return the characters with which byte-level vocabularies write the 256 bytes (GPT-2's)."""
    shown = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(256)
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


LETTERS = _letters()


def _written(token: bytes) -> str:
    return "".join([LETTERS[byte] for byte in token])


def _added(name: str, index: int) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": name, **flags, "special": True}
