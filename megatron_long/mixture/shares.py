"""How many tokens each source gets: the requested shares, and whole-token budgets."""

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron_long.corpus.documents import canonical_source
from megatron_long.errors import ConfigError

NATURAL = "natural"
SLIMPAJAMA = "slimpajama"
SLIMPAJAMA_SHARES: dict[str, float] = {
    "CommonCrawl": 0.53374772,
    "C4": 0.26609933,
    "GitHub": 0.05004782,
    "Wikipedia": 0.03402128,
    "Book": 0.0414836,
    "ArXiv": 0.04290379,
    "StackExchange": 0.03169647,
}
"""Token shares of SlimPajama as the recipe's authors use them (Fu et al. 2024, "Data Engineering for
Scaling Language Models to 128K Context"; `SLIMPAJAMA_ORIGINAL_MIX` of data_engineering/utils.py in
FranxYao/Long-Context-Data-Engineering). The paper's text rounds and orders them a little differently
(CommonCrawl 67, C4 15, GitHub, Wikipedia and Books 4.5, ArXiv 2.5, StackExchange 2.0 percent)."""

NATURAL_ERROR = 0.01
"""Error of natural shares that is aimed at, relative to the share, in 95 of 100 cases."""

SHARES_RULE = (
    f"use {NATURAL}, {SLIMPAJAMA}, or an existing YAML file with `shares:` (source: share) and, if "
    "wanted, `missing_sources: drop`"
)

MOST_SHARE = 1e18
MAX_SHARES_CHARS = 1 << 20
"""A list of shares is shorter; YAML's reader takes quadratic time for some texts."""


def parse_token_count(text: str, flag: str = "--train-tokens") -> int:
    """Read a count such as 5B, 64M, 200K, 1.5m or 4096.

    >>> parse_token_count("1.5M"), parse_token_count("5B"), parse_token_count("128")
    (1500000, 5000000000, 128)
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kmb]?)", text.strip().replace("_", "").lower())
    factor = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2]] if match else 0
    count = Decimal(match[1]) * factor if match else Decimal("0.5")
    if count != int(count):
        raise ConfigError(
            f"{flag} {text!r} is not a number of tokens; write digits with an optional K, M or B "
            "(thousand, million, billion), such as 200K, 64M or 5B"
        )
    return int(count)


def keep_ratio(long_share: float, target: float) -> float:
    """Return the probability of keeping short documents that turns one share of long tokens into another.

    >>> round(keep_ratio(0.3, 0.7), 4)
    0.1837
    """
    return long_share * (1 - target) / (target * max(1 - long_share, 1e-9))


def format_token_count(count: int) -> str:
    """Write a count as it is typed: the reverse of `parse_token_count`.

    >>> format_token_count(200_000), format_token_count(1_500_000), format_token_count(200_001)
    ('200K', '1.5M', '200001')
    """
    for letter, factor in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= factor and count % (factor // 10) == 0:
            return f"{count / factor:.1f}".removesuffix(".0") + letter
    return str(count)


def parse_shares(words: Sequence[str]) -> dict[str, float]:
    """Read the NAME=SHARE words after `--strategy upsample-sources`.

    >>> parse_shares(["ArXiv=0.2", "Book=0.1"])
    {'ArXiv': 0.2, 'Book': 0.1}

    Raises: ConfigError: a word is none, or names a source again.
    """
    shares: dict[str, float] = {}
    for word in words:
        name, _, share = word.rpartition("=")
        if canonical_source(name) in shares:
            raise ConfigError(
                f"--strategy upsample-sources names {name} twice ({' '.join(words)}); give it one share"
            )
        try:
            shares[canonical_source(name)] = float(share)
        except ValueError:
            name = ""
        if not name:
            raise ConfigError(
                f"--strategy ... {word}: write NAME=SHARE after upsample-sources, such as ArXiv=0.2"
            )
    return shares


KEYS = {"shares", "missing_sources"}
"""Allowed keys of a YAML file of shares."""


def read_shares(path: Path) -> tuple[dict[str, float], str]:
    """Read a YAML file of shares.

    Returns: The share of each source, and what to do with sources the corpus lacks.
    Raises: ConfigError: the file is missing or is not as documented.
    """
    import yaml

    if not path.is_file():
        raise ConfigError(f"--source-shares {path} does not exist; {SHARES_RULE}")
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > MAX_SHARES_CHARS or text.count("[") + text.count("{") > 100:
            raise ValueError("too large or too deep for a list of shares")
        content: Any = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--source-shares {path} is not YAML ({reason}); {SHARES_RULE}") from None
    shares = content.get("shares") if isinstance(content, dict) else None
    other = sorted(map(str, set(content) - KEYS)) if isinstance(content, dict) else []
    if not isinstance(shares, dict) or not shares or other:
        seen = f"has the key {', '.join(other)}" if other else "has no mapping under shares"
        raise ConfigError(f"--source-shares {path} {seen}; {SHARES_RULE}")
    numbers: dict[str, float] = {}
    for label, share in shares.items():
        valid = isinstance(share, int | float) and not isinstance(share, bool)
        if not valid or not 0 <= share <= MOST_SHARE:
            raise ConfigError(
                f"--source-shares {path}: share of {label} is {share!r:.40}; a share is a number from 0 to "
                f"{MOST_SHARE:g} (0 excludes the source)"
            )
        name = canonical_source(str(label))
        if name in numbers:
            raise ConfigError(f"--source-shares {path} names {name} twice")
        numbers[name] = float(share)
    return numbers, str(content.get("missing_sources", "error"))


def resolve_shares(
    named: str | Mapping[str, float], missing_sources: str, tokens_in: Mapping[str, int]
) -> dict[str, float]:
    """Return the share of each source of the corpus; they sum to 1.

    Args:
        named: `natural`, `slimpajama`, or the share of each source.
        missing_sources: `error`, or `drop` to drop shares of sources that the corpus lacks.
        tokens_in: Tokens of each source in the corpus.
    Raises: ConfigError: shares of unknown sources, sources without a share, or no share above 0.
    """
    if named == NATURAL:
        total = sum(tokens_in.values())
        return {name: tokens / total for name, tokens in tokens_in.items()}
    asked = SLIMPAJAMA_SHARES if isinstance(named, str) else dict(named)
    unknown = [name for name in asked if name not in tokens_in]
    if unknown and missing_sources == "error":
        raise ConfigError(
            f"--source-shares names {', '.join(unknown)}, which the corpus lacks (it has "
            f"{', '.join(tokens_in)}); fix the names, add those sources, or give "
            "--missing-sources drop, which scales the other shares up"
        )
    unnamed = [name for name in tokens_in if name not in asked]
    if unnamed:
        raise ConfigError(
            f"--source-shares gives no share to {', '.join(unnamed)} of the corpus; give a YAML file "
            "with a share for each (0 excludes a source)"
        )
    total_share = sum(asked[name] for name in tokens_in)
    if total_share <= 0:
        raise ConfigError(
            f"--source-shares gives no source of the corpus ({', '.join(tokens_in)}) a share above 0; "
            "raise at least one"
        )
    return {name: asked[name] / total_share for name in tokens_in}


def split_budget(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Divide `total` by `shares` into whole numbers that sum to it (largest remainders).

    >>> split_budget(10, {"a": 0.55, "b": 0.25, "c": 0.2})
    {'a': 6, 'b': 2, 'c': 2}
    """
    exact = {name: total * share for name, share in shares.items()}
    budgets = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (budgets[name] - exact[name], name))
    for name in by_remainder[: total - sum(budgets.values())]:
        budgets[name] += 1
    return budgets
