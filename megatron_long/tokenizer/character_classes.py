"""Characters that a fast engine classifies differently from the reference, found as texts contain them.

Vocabularies like Llama-3's split text by Unicode classes (letters, numbers, blanks), and each package has
the tables of some Unicode version. With Llama-3's vocabulary gigatoken 0.10.0 splits 4,657 code points
differently from tokenizers 0.23.3 (each followed by ",j"), all unassigned in Unicode 15. Each character is
compared when it first occurs, so nothing is compared at the start, and every character that is used has been.
"""

import sys
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_long.tokenizer.tokenizer_types import Tokens

CONTEXT = "a{0}a 1{0}1 {0} it'{0}b {0},j{0}.c{0}(s{0}_t{0}-m{0}=x"
"""Its tokens depend on whether the character is a letter, a number, a blank, or none of these, and on whether
a contraction (`'s` in any case) matches it: the last six are single tokens of usual vocabularies, but only
after a letter or a number."""
SURROGATES = slice(0xD800, 0xE000)
"""No text in UTF-8 has them."""
ASCII = bytes(range(128))
"""Compared by `engines.HARD_STRINGS`."""
UNKNOWN, ALIKE, DIFFERENT = range(3)

Encode = Callable[[Sequence[str]], list[Tokens]]


class CharacterClasses:
    """Which characters two tokenizers treat alike.

    Args:
        engine, reference: Their ids of several texts.
    """

    def __init__(self, engine: Encode, reference: Encode) -> None:
        self._engine, self._reference = engine, reference
        self._known = np.full(sys.maxunicode + 1, UNKNOWN, np.uint8)
        self._known[SURROGATES] = ALIKE

    def differing(self, texts: Sequence[str]) -> list[int]:
        """Return the numbers of the texts that contain a character that they treat differently."""
        # Most characters are ASCII, which bytes drop fastest; a batch has few others.
        rest = {
            number: text.encode("utf-8", "surrogatepass").translate(None, ASCII)
            for number, text in enumerate(texts)
            if not text.isascii()
        }
        codes = _codes(b"".join(rest.values()))
        new = codes[self._known[codes] == UNKNOWN]
        if len(new):
            self._compare(np.unique(new))
        if not (self._known[codes] == DIFFERENT).any():
            return []
        return [n for n, part in rest.items() if (self._known[_codes(part)] == DIFFERENT).any()]

    def _compare(self, codes: NDArray[np.uint32]) -> None:
        texts = [CONTEXT.format(chr(code)) for code in codes.tolist()]
        pairs = zip(self._engine(texts), self._reference(texts), strict=True)
        alike = [np.array_equal(got, expected) for got, expected in pairs]
        self._known[codes] = np.where(alike, ALIKE, DIFFERENT)


def _codes(text: bytes) -> NDArray[np.uint32]:
    """Return the code points of a text in UTF-8.

    >>> _codes("é\N{GRINNING FACE}".encode()).tolist()
    [233, 128512]
    """
    wide = text.decode("utf-8", "surrogatepass").encode("utf-32-le", "surrogatepass")
    return np.frombuffer(wide, np.dtype("<u4"))
