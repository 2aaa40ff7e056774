"""Characters that a fast engine classifies differently from the reference, found as texts contain them.

Vocabularies like Llama-3's split text by Unicode classes (letters, numbers, blanks), and each package has
the tables of some Unicode version. With Llama-3's vocabulary gigatoken 0.10.0 splits 4,657 code points
differently from tokenizers 0.23.3 (each followed by ",j"), all unassigned in Unicode 15. Each block of 256
code points is compared when one of its characters first occurs, so nothing is compared at the start, and
every character that is used has been.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from megatron_long.tokenizer.tokenizer_types import Tokens

BLOCK = 256
CONTEXT = "a{0}a 1{0}1 {0} it'{0}b {0},j{0}.c{0}(s{0}_t{0}-m{0}=x"
"""Its tokens depend on whether the character is a letter, a number, a blank, or none of these, and on whether
a contraction (`'s` in any case) matches it: the last six are single tokens of usual vocabularies, but only
after a letter or a number."""
SURROGATES = range(0xD800, 0xE000)

Encode = Callable[[Sequence[str]], list[Tokens]]


class CharacterClasses:
    """Which characters two tokenizers treat alike.

    Args:
        engine, reference: Their ids of several texts.
    """

    def __init__(self, engine: Encode, reference: Encode) -> None:
        self._engine, self._reference = engine, reference
        self._compared: set[int] = set()
        self.different: set[str] = set()
        """Characters of the blocks compared so far that they treat differently."""
        self._suspect = self._pattern()

    def differ(self, text: str) -> bool:
        """Whether a text contains a character that they treat differently."""
        if text.isascii():  # compared by `engines.HARD_STRINGS`
            return False
        while (found := self._suspect.search(text)) is not None:
            block = ord(found[0]) // BLOCK
            if block in self._compared:
                return True
            self._compare(block)
        return False

    def _compare(self, block: int) -> None:
        codes = range(block * BLOCK, (block + 1) * BLOCK)
        characters = [chr(code) for code in codes if code not in SURROGATES]
        texts = [CONTEXT.format(character) for character in characters]
        each = zip(characters, self._engine(texts), self._reference(texts), strict=True)
        self.different |= {c for c, got, expected in each if not np.array_equal(got, expected)}
        self._compared.add(block)
        self._suspect = self._pattern()

    def _pattern(self) -> re.Pattern[str]:
        """Characters beyond ASCII of blocks that are not compared, and those that differ.

        One class of characters, which `re` searches much faster than alternatives.
        """
        alike = [
            code
            for block in sorted(self._compared)
            for code in range(block * BLOCK, (block + 1) * BLOCK)
            if chr(code) not in self.different
        ]
        known = "".join(
            f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges([*range(128), *alike])
        )
        return re.compile(f"[^{known}]")


def ranges(codes: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of ascending numbers.

    >>> ranges([1, 2, 3, 7, 9, 10])
    [(1, 3), (7, 7), (9, 10)]
    """
    found: list[tuple[int, int]] = []
    for code in codes:
        if found and code <= found[-1][1] + 1:
            found[-1] = found[-1][0], code
        else:
            found.append((code, code))
    return found
