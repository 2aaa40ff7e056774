"""The tokenizer interface of preprocessing and evaluation, and the arrays that it returns."""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Lengths = NDArray[np.int64]
TokensAndLengths = tuple[Tokens, Lengths]

AUTO, REFERENCE = "auto", "reference"


class Tokenizer(Protocol):
    """The tokenizer interface of preprocessing and evaluation."""

    kind: str
    vocab_size: int
    bos_id: int | None
    """Id put before every document, or None if the model's tokenizer adds none."""
    eod_id: int
    vocabulary_sha256: str
    engine_name: str
    """The package that makes the ids; every engine gives the same ids."""
    engine_version: str
    engine_notes: tuple[str, ...]
    """Why faster engines are not used, one sentence each."""
    num_by_reference: int
    """Texts so far that a fast engine has left to the reference."""

    def encode(self, text: str) -> Tokens:
        """Return the ids of `text`, without special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the ids of each text, without special tokens."""

    def encode_flat(self, texts: Sequence[str]) -> TokensAndLengths:
        """Return the ids of all texts one after another, and how many each text has."""

    def encode_prompt(self, text: str) -> Tokens:
        """Return the ids of a prompt: special tokens are what `transformers` makes of them.

        If the folder has no chat template, they are text as everywhere else.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`."""


class ReferenceTokenizer(Tokenizer, Protocol):
    """A tokenizer that defines the correct ids, and what a fast engine needs to reproduce them."""

    def to_json(self) -> str:
        """Return the vocabulary as the text of a `tokenizer.json`.

        Raises: NotConvertible: it cannot be represented.
        """

    def control_ids(self) -> dict[str, int]:
        """Return the special tokens that no text gives, and their ids."""

    def special_texts(self) -> list[str]:
        """Return the special tokens and user-defined pieces as they are written in text."""


def join_ids(batch: Sequence[Sequence[int]]) -> TokensAndLengths:
    """Concatenate lists of ids.

    >>> tokens, lengths = join_ids([[5, 6], [], [7]])
    >>> tokens.tolist(), lengths.tolist()
    ([5, 6, 7], [2, 0, 1])
    """
    lengths = np.fromiter(map(len, batch), np.int64, len(batch))
    tokens = np.fromiter(chain.from_iterable(batch), np.int32, int(lengths.sum()))
    return tokens, lengths


def split_flat(tokens: Tokens, lengths: Lengths) -> list[Tokens]:
    """Split concatenated ids into one array per text, each a view.

    >>> [part.tolist() for part in split_flat(np.array([5, 6, 7], np.int32), np.array([2, 0, 1]))]
    [[5, 6], [], [7]]
    """
    ends = np.cumsum(lengths).tolist()
    return [tokens[end - size : end] for end, size in zip(ends, lengths.tolist(), strict=True)]


def hash_vocabulary(pieces: Iterable[str]) -> str:
    """Hash the pieces of a vocabulary in the order of their ids.

    >>> hash_vocabulary(["a", "b"]) == hash_vocabulary(["ab", ""])
    False
    """
    digest = hashlib.sha256()
    for piece in pieces:
        encoded = piece.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    return digest.hexdigest()
