"""gigatoken as an engine, with a small cache of words that are worth keeping.

The cache never evicts a word (gigatoken 0.10.0), so the engine is recreated when the process has grown by
more than its share of the memory that is left. Recreating takes half a second of Llama-3's vocabulary.
For vocabularies like Llama-2's a "word" is all between two spaces, "end\\nBegin" or "x[127]=3.5": most
of these occur once and cost ten times as much as a cached word. A character that no merge of the vocabulary
contains is always a token of its own; given these (newlines, digits), gigatoken splits words at them,
gives the same ids and needs half the cache.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_long.freed_memory import give_memory_back, resident_bytes
from megatron_long.machine import host_memory
from megatron_long.tokenizer.tokenizer_types import TokensAndLengths

CACHE_CHECK_BYTES = 4 << 20
"""Amount of text after which an engine's memory is checked."""
CACHE_GROWTH_BYTES = 96 << 20, 384 << 20
"""Least and most growth of the process after which the engine is recreated."""
CACHE_SHARE = 1 / 4
"""Share of the available memory of each core that the cache may use, within these limits."""
SEPARATE_CANDIDATES = "\n\t\r0123456789"
LLAMA_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ],
}


class GigatokenEngine:
    """gigatoken, on the calling thread; recreated when its cache of words has grown too large."""

    def __init__(self, tokenizer_json: str) -> None:
        self._json, self._has_no_prefix = separate_characters(tokenizer_json)
        self._engine: Any = None
        self._seen = self._resident_before = 0
        self.num_rebuilds = -1
        self._rebuild()

    def encode_flat(self, texts: Sequence[str]) -> TokensAndLengths:
        self._bound_cache(sum(map(len, texts)))
        if self._has_no_prefix:
            texts = [" " + text if text else text for text in texts]
        # Text by text: `encode` keeps its cache from call to call, a batch starts with an empty one.
        parts = list(map(self._engine.encode, texts))
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        tokens = np.concatenate(parts) if parts else np.zeros(0, np.uint32)
        return tokens.view(np.int32), lengths

    def release(self) -> None:
        """Free the memory; the next call recreates the engine."""
        self._engine = None
        give_memory_back()

    def _bound_cache(self, size: int) -> None:
        if self._engine is None:
            self._rebuild()
        self._seen += size
        if self._seen < CACHE_CHECK_BYTES:
            return
        self._seen = 0
        if resident_bytes() - self._resident_before > growth_limit():
            self._rebuild()

    def _rebuild(self) -> None:
        import gigatoken

        self._engine = None  # before the new one, so that memory never holds both
        give_memory_back()
        self._engine = gigatoken.Tokenizer.from_json(self._json).backend
        self._seen = 0
        self._resident_before = resident_bytes()
        self.num_rebuilds += 1


def growth_limit() -> float:
    """Return the growth in bytes after which an engine is recreated: less when memory is short."""
    least, most = CACHE_GROWTH_BYTES
    free = host_memory()
    has_affinity = hasattr(os, "sched_getaffinity")  # macOS has not
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    share = CACHE_SHARE * free.free_bytes / cores if free else least
    return min(max(share, least), most)


def separate_characters(tokenizer_json: str) -> tuple[str, bool]:
    """Turn characters that never merge into tokens that split words, if the vocabulary is like Llama-2's.

    Returns: The vocabulary; and whether it no longer puts a space before a text, which the caller must do.
    """
    content = json.loads(tokenizer_json)
    model = content["model"]
    unknown = content.get("pre_tokenizer") or content.get("added_tokens")
    if unknown or not model.get("byte_fallback") or content["normalizer"] != LLAMA_NORMALIZER:
        return tokenizer_json, False
    merged = {char for merge in model["merges"] for part in merge for char in part}
    alone = [char for char in SEPARATE_CANDIDATES if char not in merged]
    ids = {
        char: model["vocab"].get(char, model["vocab"].get(f"<0x{ord(char):02X}>")) for char in alone
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content["added_tokens"] = [
        {"id": index, "content": char, **flags} for char, index in ids.items() if index is not None
    ]
    # It would be put after every added token, too.
    content["normalizer"] = LLAMA_NORMALIZER["normalizers"][1]
    return json.dumps(content, ensure_ascii=False), True
