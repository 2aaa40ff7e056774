"""The haystack of the needle test: a long text as tokens, with its sentence boundaries.

Sentences come from NLTK's Punkt algorithm, trained without supervision on the haystack itself:
nothing is downloaded, and any language or jargon works. Source of the algorithm: Kiss and Strunk
2006, "Unsupervised multilingual sentence boundary detection". Punkt knows ends by the white space after
them, so those of Chinese and Japanese are found here; text without any is cut at its line breaks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_long.errors import ConfigError

if TYPE_CHECKING:
    from megatron_long.tokenizer.tokenizer_types import Tokenizer

FIRST_CHARACTERS_PER_TOKEN = 8
"""First guess of the text that is needed; doubled until there are enough tokens."""

BLANK_LINE = re.compile(r"\s*\n\s*\n")

LINE_BREAK = re.compile(r"\s*\n")

WIDE_END = re.compile(r"(?:[。！？｡]+|…(?!\s*[a-z…]))[”’」』）】》]*")
"""Sentence ends that need no white space after them, with closing quotes; "so … on" is not one."""

LONGEST_SENTENCE_CHARACTERS = 2000
"""Longer pieces are no sentences but code, lists or transcripts: their lines take the place."""

ANCHOR = "a"
"""A word before the text, so that the text is tokenized as a continuation, not as a beginning."""


@dataclass(frozen=True)
class Haystack:
    """Tokens of a text and where its sentences end."""

    tokens: np.ndarray
    """Token ids [n], int64."""
    sentence_ends: np.ndarray
    """Offset after the last token of each sentence, increasing; the last one is n."""
    text: str = ""
    """What the tokens say, as far as it is known."""

    def num_windows(self, num_tokens: int) -> int:
        """Give the number of different windows of this length.

        >>> Haystack(np.arange(10), np.array([3, 7, 10])).num_windows(5)
        2
        """
        return len(self.sentence_ends) - int(np.searchsorted(self.sentence_ends, num_tokens))

    def window(self, num_tokens: int, number: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Give `num_tokens` tokens that end with a sentence, and the boundaries among them.

        When sentences do not add up to `num_tokens` the first sentence loses its beginning.

        Args:
            number: Which of the windows; 0 starts as early in the text as it can.
        Returns: Tokens [num_tokens]; offsets where a needle may go: 0 and each sentence end.

        >>> haystack = Haystack(np.arange(10), np.array([3, 7, 10]))
        >>> tokens, boundaries = haystack.window(5)
        >>> tokens.tolist(), boundaries.tolist()
        ([2, 3, 4, 5, 6], [0, 1, 5])
        """
        assert 0 < num_tokens <= len(self.tokens), "window longer than the haystack"
        first = int(np.searchsorted(self.sentence_ends, num_tokens))
        stop = int(self.sentence_ends[first + number])
        start = stop - num_tokens
        ends = self.sentence_ends
        inside = ends[(ends > start) & (ends <= stop)] - start
        return self.tokens[start:stop], np.concatenate([[0], inside])


def read_haystack(path: Path, flag: str = "--haystack") -> str:
    """Read a text file as UTF-8.

    Args:
        flag: What the user gave it with, for errors.
    Raises: ConfigError: no such file, not text, or nothing but white space.
    """
    if not path.is_file():
        raise ConfigError(f"{flag} {path} is not a file; give a long text file in UTF-8")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{flag} {path} is not UTF-8 text (byte {error.start}: {error.reason}); "
            "give plain text in UTF-8"
        ) from error
    if not text.strip():
        raise ConfigError(f"{flag} {path} holds no text; give a long text file in UTF-8")
    return text


def tokenize_haystack(text: str, tokenizer: Tokenizer, num_tokens: int) -> Haystack:
    """Split the beginning of a text into sentences and tokenize them.

    Args:
        num_tokens: Tokens wanted. Fewer come back only when the whole text has fewer.
    """
    num_characters = FIRST_CHARACTERS_PER_TOKEN * num_tokens
    while True:
        haystack = _tokenize_sentences(text[:num_characters], tokenizer, num_characters < len(text))
        if len(haystack.tokens) >= num_tokens or num_characters >= len(text):
            return haystack
        num_characters *= 2


def _tokenize_sentences(text: str, tokenizer: Tokenizer, is_cut: bool) -> Haystack:
    pieces = split_sentences(text)
    if is_cut:
        pieces = pieces[:-1]  # the last one's end is missing; white space alone gives no piece
    encoded = encode_continuations(tokenizer, pieces)
    tokens = np.concatenate([np.zeros(0, dtype=np.int64), *encoded])
    ends = np.unique(np.cumsum([len(piece) for piece in encoded], dtype=np.int64))
    return Haystack(tokens, ends, "".join(pieces))


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences, each with the white space before it.

    White space goes with what follows because tokenizers join it to the next word. A blank line
    ends a sentence whatever comes before it; any line break does within what is too long for one.

    >>> split_sentences("A heading\\n\\nIt rained all day. We stayed at home and read.")
    ['A heading', '\\n\\nIt rained all day.', ' We stayed at home and read.']
    >>> split_sentences("下雨了。「我們在家！」他說。")
    ['下雨了。', '「我們在家！」', '他說。']
    """
    from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTrainer

    punkt = PunktSentenceTokenizer(PunktTrainer(text).get_params())
    ends = {end for _, end in punkt.span_tokenize(text)}
    ends |= {blank.start() for blank in BLANK_LINE.finditer(text)}
    ends |= {end.end() for end in WIDE_END.finditer(text)}
    in_order = sorted(ends - {0})
    pieces = zip([0, *in_order], in_order, strict=False)
    return [
        text[first:last]
        for start, end in pieces
        for first, last in pairwise([start, *_line_ends(text, start, end), end])
    ]


def _line_ends(text: str, start: int, end: int) -> list[int]:
    """Where lines end within a piece that is too long for a sentence."""
    if end - start <= LONGEST_SENTENCE_CHARACTERS:
        return []
    breaks = (found.start() for found in LINE_BREAK.finditer(text, start, end))
    return [place for place in breaks if start < place < end]


def encode_continuations(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Tokenize each text as it would be after another word.

    A SentencePiece model puts a space before whatever it is given, other tokenizers do not: with a
    word in front both give the tokens of running text. Where the tokenizer merges the word with
    the text (which then begins within a word), the text is tokenized on its own.

    Returns: Token ids of each text, int64.
    """
    anchor = np.asarray(tokenizer.encode(ANCHOR))
    with_anchor = tokenizer.encode_batch([ANCHOR + text for text in texts])
    return [
        np.asarray(
            ids[len(anchor) :]
            if np.array_equal(ids[: len(anchor)], anchor)
            else tokenizer.encode(text),
            dtype=np.int64,
        )
        for text, ids in zip(texts, with_anchor, strict=True)
    ]
