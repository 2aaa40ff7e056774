"""Plain text files as rows to score: a book's perplexity by window needs no dataset.

Each file is one source, cut into rows of the context length one after another, as perplexity of long
books is measured: no row is shorter, and none begins where another has not ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_long.errors import DataError
from megatron_long.evaluation.loss.held_out import HeldOutDocument
from megatron_long.evaluation.needle.haystack import read_haystack

if TYPE_CHECKING:
    from megatron_long.tokenizer.tokenizer_types import Tokenizer

FIRST_CHARACTERS_PER_TOKEN = 8
"""First guess of the text that a number of rows needs; doubled until there is enough."""


class TextRows:
    """The tokens of one text, cut into rows; see `held_out.DocumentReader`.

    Args:
        tokens: Token ids of the text [n].
        row_tokens: Tokens of a row: the context and one more, the last label.
        bos_id: Token put before each row, if the tokenizer has one.

    >>> rows = TextRows(np.arange(10), row_tokens=4, bos_id=None)
    >>> rows.lengths.tolist(), rows.read(1).tolist()
    ([4, 4], [4, 5, 6, 7])
    """

    def __init__(self, tokens: np.ndarray, *, row_tokens: int, bos_id: int | None) -> None:
        opening = [] if bos_id is None else [bos_id]
        step = row_tokens - len(opening)
        self._rows = [
            np.concatenate([opening, tokens[start : start + step]]).astype(np.int64)
            for start in range(0, len(tokens) - step + 1, step)
        ]

    @property
    def lengths(self) -> np.ndarray:
        """Length of each row, tokens."""
        return np.array([len(row) for row in self._rows], dtype=np.int64)

    def read(self, index: int, /) -> np.ndarray:
        """Give the tokens of one row."""
        return self._rows[index]


def open_texts(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    context_length: int,
    max_rows: int | None,
) -> list[HeldOutDocument]:
    """Give the rows of text files, file by file.

    Args:
        max_rows: The first so many of each file; None takes all.
    Raises: ConfigError: a file is missing or not text. DataError: two files have one name, or a file holds
        no whole row.
    """
    rows: list[HeldOutDocument] = []
    sources: dict[str, Path] = {}
    for path in paths:
        other = sources.setdefault(path.stem, path)
        if other is not path:
            raise DataError(
                f"--text {path} and {other} have the same name, which would be their source; rename one"
            )
        text = read_haystack(path, "--text")
        tokens = _tokenize(text, tokenizer, None if max_rows is None else max_rows * context_length)
        reader = TextRows(tokens, row_tokens=context_length + 1, bos_id=tokenizer.bos_id)
        found = len(reader.lengths)
        if not found:
            raise DataError(
                f"--text {path} has {len(tokens):,} tokens, fewer than a row of --context-length "
                f"{context_length} and the token after it; use a longer text or a shorter context"
            )
        rows += [HeldOutDocument(path.stem, reader, index) for index in range(found)[:max_rows]]
    return rows


def hash_texts(paths: Sequence[Path], vocabulary_sha256: str, context_length: int) -> str:
    """Give a hash of texts, vocabulary and row length, so that reports on other rows are told apart."""
    digest = sha256(f"{vocabulary_sha256} {context_length}".encode())
    for path in paths:
        digest.update(path.stem.encode() + b"\0" + sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _tokenize(text: str, tokenizer: Tokenizer, num_tokens: int | None) -> np.ndarray:
    """The first tokens of a text, a little more than asked, without reading all of a long one."""
    if num_tokens is None:
        return np.asarray(tokenizer.encode(text))
    characters = FIRST_CHARACTERS_PER_TOKEN * (num_tokens + 1)
    while True:
        tokens = np.asarray(tokenizer.encode(text[:characters]))
        if len(tokens) > num_tokens + 1 or characters >= len(text):
            return tokens
        characters *= 2
