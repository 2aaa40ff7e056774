"""Fast engines for the tokenizer protocol: the same ids as the reference, ten times as fast.

The reference is the package that the tokenizer file belongs to (SentencePiece, or Hugging Face
tokenizers). A fast engine is used only after it gave the reference's ids on strings that break
tokenizers, and again on a sample of the corpus; if it differs, the next one is tried, and finally
the reference itself. Engines get a `tokenizer.json` without special tokens, so that a literal
`<|end_of_text|>` inside a document stays text.
"""

import itertools
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import Protocol

import numpy as np

from megatron_long.errors import ConfigError
from megatron_long.tokenizer.character_classes import CharacterClasses, Encode
from megatron_long.tokenizer.gigatoken_engine import GigatokenEngine
from megatron_long.tokenizer.tokenizer_types import (
    AUTO,
    REFERENCE,
    ReferenceTokenizer,
    Tokenizer,
    Tokens,
    TokensAndLengths,
    split_flat,
)

logger = logging.getLogger(__name__)

SAMPLE_BYTES = 1 << 20
"""Text of a corpus that is compared with the reference, about."""
SAMPLE_TEXT_CHARS = 1 << 16
"""Characters that are taken of one text of the sample."""

SOURCE_LOCATION = "\n\nLocation:"
"""What an engine written in Rust puts before the line of its own code where an error arose."""

HARD_STRINGS = (
    "",
    " ",
    "  ",
    "   leading and trailing   ",
    "\n",
    "\n\n\n\ttab\t\ttabs\r\n \r\n  \n x",
    "a\x00b\x00\x00",
    "\ufeffbyte order mark\u200b\u200d zero width\u00a0no-break\u3000ideographic\u2028line",
    "▁ ▁▁a▁ b ▁",
    "<s></s><unk><pad><s>a</s> <|end_of_text|><|begin_of_text|><|endoftext|>[INST] <0x0A><0xE2>",
    "don't we'll I'M THEY'RE it's 'S '' \"quoted\"",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F 1e-9 ½ ٣٤٥ ²³",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1e8\U0001f1ed\U0001f3fd \u2764\ufe0f",
    "e\u0301 \u00e9 n\u0303 \u0301alone \u1e9b\u0323 ﬁ Å Å",
    "Ελληνικά Русский עברית العربية हिन्दी ไทย 日本語 中文 한국어 ქართული አማርኛ \U00010348\U0001d518",
    "\u0378\ue000\ufffd\uffff\U000e0001\U0010ffff",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # comment\n\n\n\tif x != 0: pass\n",
    "\\begin{align}\n  \\frac{\\partial L}{\\partial \\theta_{i,j}} &= x_k^2 \\\\\n\\end{align}",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\dir\\file.txt",
    "CamelCaseIdentifier snake_case_name SCREAMING_CASE kebab-case x" * 3,
    *(piece * count for piece in "a =-_.\n\té中" for count in (7, 64, 257, 4001)),
    "ab" * 3000,
    "the quick brown fox " * 400,
    "".join(map(chr, itertools.chain(range(1, 0x250), range(0x2000, 0x2070)))),
)
"""Strings on which tokenizers have been seen to differ."""


class Engine(Protocol):
    """Converts text to ids."""

    def encode_flat(self, texts: Sequence[str]) -> TokensAndLengths:
        """Return the ids of all texts one after another, and how many each text has."""


class TuetokenEngine:
    """tuetoken, on one thread."""

    def __init__(self, tokenizer_json: str) -> None:
        import tuetoken

        with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".json") as file:
            file.write(tokenizer_json)
            file.flush()
            self._engine = tuetoken.Tokenizer(file.name)

    def encode_flat(self, texts: Sequence[str]) -> TokensAndLengths:
        batch = self._engine.encode_ordinary_to_buffer(list(texts), num_threads=1)
        return np.asarray(batch["data"]).view(np.int32), np.diff(batch["offsets"])


ENGINES: dict[str, Callable[[str], Engine]] = {
    "gigatoken": GigatokenEngine,
    "tuetoken": TuetokenEngine,
}
"""Engines by package, the fastest first."""


class FastTokenizer:
    """A tokenizer that takes ids from a fast engine, and everything else from the reference.

    Texts with characters that the engine classifies differently go to the reference, too.
    """

    def __init__(
        self, reference: ReferenceTokenizer, engine: Engine, name: str, notes: Sequence[str] = ()
    ) -> None:
        self.reference, self.engine = reference, engine
        self.kind, self.vocab_size = reference.kind, reference.vocab_size
        self.bos_id, self.eod_id = reference.bos_id, reference.eod_id
        self.vocabulary_sha256 = reference.vocabulary_sha256
        self.engine_name, self.engine_version = name, version(name)
        self.engine_notes = tuple(notes)
        self.num_by_reference = 0
        """Texts so far that the reference encoded."""
        self._classes = CharacterClasses(self.encode_by_engine, reference.encode_batch)

    def encode(self, text: str) -> Tokens:
        return self.encode_flat([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        return split_flat(*self.encode_flat(texts))

    def encode_by_engine(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the ids of each text, whatever its characters."""
        return split_flat(*self.engine.encode_flat(texts))

    def encode_flat(self, texts: Sequence[str]) -> TokensAndLengths:
        differing = self._classes.differing(texts)
        if not differing:
            return self.engine.encode_flat(texts)
        self.num_by_reference += len(differing)
        others = set(differing)
        parts = self.encode_by_engine([t for n, t in enumerate(texts) if n not in others])
        replaced = self.reference.encode_batch([texts[number] for number in differing])
        for number, ids in zip(differing, replaced, strict=True):
            parts.insert(number, ids)
        return np.concatenate(parts), np.fromiter(map(len, parts), np.int64, len(parts))

    def encode_prompt(self, text: str) -> Tokens:
        return self.reference.encode_prompt(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self.reference.decode(ids)


def open_engine(reference: ReferenceTokenizer, engine: str) -> Tokenizer:
    """Return the tokenizer with the engine asked for, checked on HARD_STRINGS.

    Args:
        engine: `auto` for the fastest one that agrees with the reference, the name of a package in
            ENGINES, or `reference` (or its package).
    Raises: ConfigError: no such engine, or the one named cannot be used or differs.
    """
    if engine in (REFERENCE, reference.engine_name):
        return reference
    if engine != AUTO and engine not in ENGINES:
        choices = ", ".join((AUTO, *ENGINES, REFERENCE))
        raise ConfigError(f"tokenizer engine {engine!r} is unknown; choose one of {choices}")
    notes = list(reference.engine_notes)
    for name in ENGINES if engine == AUTO else [engine]:
        try:
            fast = FastTokenizer(reference, ENGINES[name](plain_json(reference)), name, notes)
            hard = HARD_STRINGS + _special_strings(reference)
            reason = find_difference(fast.encode_by_engine, reference, hard)
        except ImportError:
            reason = f"it is not installed (pip install {name})"
        except Exception as error:
            reason = unreadable(name, error)
        if not reason:
            return fast
        notes.append(f"{name} is not used: {reason}")
        if engine != AUTO:
            raise ConfigError(f"tokenizer engine {notes[-1]}; use {AUTO} or {REFERENCE}")
        logger.warning("tokenizer engine %s", notes[-1])
    reference.engine_notes = tuple(notes)
    return reference


def check_sample(tokenizer: Tokenizer, texts: Iterable[str]) -> Tokenizer:
    """Compare an engine with the reference on texts of the corpus.

    Args:
        texts: A sample; SAMPLE_BYTES of it are used, and of each text its beginning.
    Returns: `tokenizer`, or, when it differs anywhere, the next engine that does not; the warning
        is logged and among its `engine_notes`.
    """
    sample = _take_sample(texts)
    while isinstance(tokenizer, FastTokenizer):
        reason = find_difference(tokenizer.encode_batch, tokenizer.reference, sample)
        if not reason:
            break
        reference, name = tokenizer.reference, tokenizer.engine_name
        notes = [*tokenizer.engine_notes, f"{name} is not used: on the corpus {reason}"]
        logger.warning("tokenizer engine %s", notes[-1])
        reference.engine_notes = tuple(notes)
        rest = itertools.islice(ENGINES, list(ENGINES).index(name) + 1, None)
        tokenizer = next(filter(None, (_try_engine(reference, other) for other in rest)), reference)
    return tokenizer


def release_engine(tokenizer: Tokenizer) -> None:
    """Free an engine's cache; the engine stays usable."""
    if isinstance(tokenizer, FastTokenizer) and isinstance(tokenizer.engine, GigatokenEngine):
        tokenizer.engine.release()


def find_difference(encode: Encode, reference: Tokenizer, texts: Sequence[str]) -> str:
    """Describe on which text ids differ from the reference's; an empty string if on none."""
    pairs = zip(texts, encode(texts), reference.encode_batch(texts), strict=True)
    for text, got, expected in pairs:
        if not np.array_equal(got, expected):
            same = np.minimum(len(got), len(expected))
            differs = np.flatnonzero(got[:same] != expected[:same])
            at = int(differs[0]) if len(differs) else int(same)
            return (
                f"it differs from {reference.engine_name} in token {at} of {text[:40]!r} "
                f"({len(text):,} characters): {got[at : at + 4].tolist()} instead of "
                f"{expected[at : at + 4].tolist()}"
            )
    return ""


def unreadable(name: str, error: Exception) -> str:
    """Explain why an engine cannot use a vocabulary, in terms of the tokenizer file.

    An engine may answer with the source line of its own code; the log keeps that for its authors.

    >>> unreadable("gigatoken", ValueError("a.rs:7: no single-byte vocab entry for byte 0x04"))
    'its vocabulary lacks bytes that gigatoken needs as tokens of their own (0x04)'
    """
    logger.debug("%s cannot read the vocabulary: %s", name, error)
    byte = re.search(r"no single-byte vocab entry for byte (0x[0-9a-fA-F]{2})", str(error))
    if byte:
        return f"its vocabulary lacks bytes that {name} needs as tokens of their own ({byte[1]})"
    message = " ".join(str(error).partition(SOURCE_LOCATION)[0].split())
    return f"it cannot read this vocabulary ({message or type(error).__name__})"


def plain_json(reference: ReferenceTokenizer) -> str:
    """Return a vocabulary as `tokenizer.json` whose special tokens are no longer found in text."""
    tokenizer = json.loads(reference.to_json())
    tokenizer["added_tokens"] = [
        token for token in tokenizer.get("added_tokens") or [] if not token["special"]
    ]
    tokenizer.update(truncation=None, padding=None, post_processor=None)
    return json.dumps(tokenizer, ensure_ascii=False)


def _try_engine(reference: ReferenceTokenizer, name: str) -> Tokenizer | None:
    try:
        return open_engine(reference, name)
    except ConfigError:
        return None


def _special_strings(reference: ReferenceTokenizer) -> tuple[str, ...]:
    return tuple(f"a {text}b{text}{text} {text}" for text in reference.special_texts())


def _take_sample(texts: Iterable[str]) -> list[str]:
    sample, size = [], 0
    for text in texts:
        if size >= SAMPLE_BYTES:
            break
        sample.append(text[:SAMPLE_TEXT_CHARS])
        size += len(sample[-1].encode("utf-8", "replace"))
    return sample
