"""What a training set should contain: the mixture, its strategies, and the tokens of each source."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_long.errors import ConfigError
from megatron_long.mixture.shares import (
    NATURAL,
    SHARES_RULE,
    SLIMPAJAMA,
    SLIMPAJAMA_SHARES,
    resolve_shares,
)

MOST_TOKENS, MOST_PASSES = 10**15, 2**16 - 1
"""Passes are counted in two bytes; tokens in eight, and their products in float64 must be exact."""


@dataclass(frozen=True)
class Strategy:
    """How a strategy treats documents."""

    thins_short: bool = False
    """Short documents are downsampled, so that long ones have more weight."""
    is_pooled: bool = False
    """All sources are one pool, whose documents determine the shares."""
    cuts: bool = False
    """Documents are cut into pieces of `cut_length_tokens`."""
    names_shares: bool = False
    """Shares of some sources are given with the strategy."""


STRATEGIES: dict[str, Strategy] = {
    "per-source": Strategy(thins_short=True),
    "original": Strategy(),
    "cut": Strategy(cuts=True),
    "global": Strategy(thins_short=True, is_pooled=True),
    "upsample-sources": Strategy(names_shares=True),
}
"""The data of Fu et al. 2024, table 5: per-source and global length upsampling, original lengths ("cut at
128K": documents stay whole in the file), cut at 4K, and one domain upsampled."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What the training set should contain."""

    train_tokens: int
    """Tokens of the training set, met exactly."""
    strategy: str = "per-source"
    """A key of STRATEGIES."""
    short_keep_ratio: float = 0.1
    """Probability with which a document shorter than the threshold is kept."""
    long_token_share: float | None = None
    """Share of a source's tokens in long documents; if given, it replaces `short_keep_ratio`."""
    long_threshold_tokens: int = 4096
    """Documents with at least this many tokens are long."""
    cut_length_tokens: int = 4096
    """Length of pieces (with BOS and EOD) under the strategy `cut`."""
    upsampled_shares: Mapping[str, float] = field(default_factory=dict)
    """Shares of all training tokens under `upsample-sources`; the other sources divide the rest."""
    source_shares: str | Mapping[str, float] = NATURAL
    """`natural`, `slimpajama`, or the share of each source (normalized to a sum of 1)."""
    missing_sources: str = "error"
    """`error`, or `drop` to drop shares of sources that the corpus lacks."""
    valid_tokens_per_source: int = 200_000
    """Tokens that each source holds out, in whole documents."""
    allow_repeat: int = 1
    """How many times one document may be used."""
    short_share: float = 0.0
    """Share of the training tokens in documents as they are, in the corpus's own distribution of lengths,
    next to the length-upsampled rest; each source gives both in its share."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"--strategy {self.strategy}: choose one of {', '.join(STRATEGIES)}")
        if not 0 <= self.short_keep_ratio <= 1:
            raise ConfigError(f"--short-keep-ratio {self.short_keep_ratio} is not within 0 and 1")
        if self.missing_sources not in ("error", "drop"):
            raise ConfigError(f"missing_sources is {self.missing_sources!r}; use error or drop")
        flags = {
            "train_tokens": ("--train-tokens", 1),
            "valid_tokens_per_source": ("--valid-tokens-per-source", 0),
            "allow_repeat": ("--allow-repeat", 1),
            "long_threshold_tokens": ("--long-threshold", 1),
            "cut_length_tokens": ("--cut-length", 3),
        }
        for name, (flag, minimum) in flags.items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"{flag} {getattr(self, name)} is too small; at least {minimum}")
            most = MOST_PASSES if name == "allow_repeat" else MOST_TOKENS
            if getattr(self, name) > most:
                raise ConfigError(f"{flag} {getattr(self, name)} is too large; at most {most:,}")
        if isinstance(self.source_shares, str) and self.source_shares not in (NATURAL, SLIMPAJAMA):
            raise ConfigError(f"--source-shares {self.source_shares}: {SHARES_RULE}")
        _check_strategy(self)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, without what was added later and is not used: older records compare equal."""
        content = asdict(self)
        if not self.short_share:
            del content["short_share"]
        return content

    @property
    def plain_tokens(self) -> int:
        """Training tokens in documents as they are."""
        return round(self.short_share * self.train_tokens)

    @property
    def rules(self) -> Strategy:
        """What the strategy does."""
        return STRATEGIES[self.strategy]

    @property
    def is_natural(self) -> bool:
        """Whether the tokens of the corpus decide the shares of the sources."""
        return self.source_shares == NATURAL and not self.rules.is_pooled

    @property
    def keep_short(self) -> float | None:
        """Probability of keeping a short document; None if it must be solved for."""
        if not self.rules.thins_short:
            return 1.0
        return self.short_keep_ratio if self.long_token_share is None else None


def source_shares(mixture: Mixture, tokens_in: Mapping[str, int]) -> dict[str, float]:
    """Return the share of each source of the corpus; they sum to 1.

    Args:
        tokens_in: Tokens of each source in the corpus.
    Raises: ConfigError: the shares do not fit the corpus.
    """
    base = resolve_shares(mixture.source_shares, mixture.missing_sources, tokens_in)
    if not mixture.rules.names_shares:
        return base
    named = mixture.upsampled_shares
    unknown = [name for name in named if name not in tokens_in]
    if unknown:
        raise ConfigError(
            f"--strategy upsample-sources names {', '.join(unknown)}, which the corpus lacks (it has "
            f"{', '.join(tokens_in)})"
        )
    rest = sum(share for name, share in base.items() if name not in named)
    left = 1 - sum(named.values())
    if rest <= 0 and left > 1e-9:
        raise ConfigError(
            f"--strategy upsample-sources gives {1 - left:g} of the tokens to the sources named, and no "
            "other source has a share to take the rest; let the shares sum to 1"
        )
    return {
        name: named.get(name, left * share / rest if rest else 0) for name, share in base.items()
    }


def named_sources(mixture: Mixture) -> frozenset[str] | None:
    """Return the sources that have a share, or None if any may be in the corpus."""
    if mixture.source_shares == NATURAL:
        return None
    if isinstance(mixture.source_shares, str):
        return frozenset(SLIMPAJAMA_SHARES)
    return frozenset(mixture.source_shares)


def _check_strategy(mixture: Mixture) -> None:
    rules, named = mixture.rules, mixture.upsampled_shares
    share = mixture.long_token_share
    if share is not None and not 0 < share < 1:
        raise ConfigError(f"--long-token-share {share} is not between 0 and 1")
    if share is not None and not rules.thins_short:
        raise ConfigError(
            f"--long-token-share has no effect with --strategy {mixture.strategy}, which keeps every "
            "document; use per-source or global"
        )
    if not 0 <= mixture.short_share < 1:
        raise ConfigError(f"--short-share {mixture.short_share} is not at least 0 and below 1")
    if mixture.short_share and (rules.is_pooled or not rules.thins_short):
        raise ConfigError(
            f"--short-share has no effect with --strategy {mixture.strategy}: documents as they are lie "
            "next to those of --strategy per-source; use that"
        )
    if rules.is_pooled and mixture.source_shares != NATURAL:
        raise ConfigError(
            f"--source-shares has no effect with --strategy {mixture.strategy}: its shares are what "
            "upsampling long documents of all sources gives; leave it out"
        )
    if rules.names_shares != bool(named):
        raise ConfigError(
            "--strategy upsample-sources needs shares, and no other strategy accepts them: "
            "--strategy upsample-sources ArXiv=0.2 Book=0.2"
        )
    if any(not 0 < value <= 1 for value in named.values()) or sum(named.values()) > 1 + 1e-9:
        listed = " ".join(f"{name}={value:g}" for name, value in named.items())
        raise ConfigError(
            f"--strategy upsample-sources {listed}: each is a share of all training tokens, above 0, "
            "and together they are at most 1"
        )
