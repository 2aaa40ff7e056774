import dataclasses

import pytest

from megatron_long.errors import ConfigError
from megatron_long.mixture.mixture import (
    STRATEGIES,
    Mixture,
    named_sources,
    source_shares,
)
from megatron_long.mixture.shares import split_budget

BASE = Mixture(train_tokens=300_000, long_threshold_tokens=1000, valid_tokens_per_source=5000)
TOKENS_IN = {"ArXiv": 100, "Book": 200, "C4": 700}


def upsample(**shares):
    return dataclasses.replace(BASE, strategy="upsample-sources", upsampled_shares=shares)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "best"}, "--strategy best: choose one of per-source, original, cut, global"),
        ({"short_keep_ratio": 1.5}, r"--short-keep-ratio 1\.5"),
        ({"train_tokens": 0}, "--train-tokens 0 is too small"),
        ({"long_threshold_tokens": 0}, "--long-threshold 0 is too small"),
        ({"valid_tokens_per_source": -1}, "--valid-tokens-per-source -1 is too small"),
        ({"allow_repeat": 0}, "--allow-repeat 0 is too small"),
        ({"cut_length_tokens": 2}, "--cut-length 2 is too small"),
        ({"long_threshold_tokens": 10**20}, "--long-threshold 1000+ is too large; at most 1,000,"),
        ({"train_tokens": 10**16}, "--train-tokens 1000+ is too large"),
        ({"allow_repeat": 2**16}, "--allow-repeat 65536 is too large; at most 65,535"),
        ({"source_shares": "slim"}, "--source-shares slim: use natural, slimpajama"),
        ({"missing_sources": "skip"}, "missing_sources is 'skip'"),
        ({"long_token_share": 1.0}, r"--long-token-share 1\.0 is not between 0 and 1"),
        ({"long_token_share": 0.7, "strategy": "cut"}, "no effect with --strategy cut"),
        ({"strategy": "global", "source_shares": "slimpajama"}, "--source-shares has no effect"),
        ({"strategy": "upsample-sources"}, "needs shares"),
        ({"upsampled_shares": {"Book": 0.5}}, "no other strategy accepts them"),
        (
            {"strategy": "upsample-sources", "upsampled_shares": {"Book": 0.7, "C4": 0.6}},
            r"Book=0\.7 C4=0\.6: .* together they are at most 1",
        ),
    ],
)
def test_mixture_checks_itself(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(BASE, **changes)


def test_upsampled_sources_take_their_shares_and_the_others_divide_the_rest():
    shares = source_shares(upsample(Book=0.6), TOKENS_IN)
    assert shares == pytest.approx({"ArXiv": 0.05, "Book": 0.6, "C4": 0.35})
    assert sum(split_budget(BASE.train_tokens, shares).values()) == BASE.train_tokens
    assert source_shares(upsample(Book=0.6, ArXiv=0.4), TOKENS_IN)["C4"] == 0


def test_upsampling_what_is_not_there():
    with pytest.raises(ConfigError, match="names GitHub, which the corpus lacks"):
        source_shares(upsample(GitHub=0.5), TOKENS_IN)
    with pytest.raises(ConfigError, match=r"gives 0\.9 of the tokens .* no other source"):
        source_shares(upsample(Book=0.9), {"Book": 10})


def test_only_thinning_strategies_drop_documents():
    kept = {name: strategy.thins_short for name, strategy in STRATEGIES.items()}
    assert kept == {
        "per-source": True,
        "original": False,
        "cut": False,
        "global": True,
        "upsample-sources": False,
    }
    assert BASE.keep_short == 0.1
    assert dataclasses.replace(BASE, strategy="original").keep_short == 1.0
    assert dataclasses.replace(BASE, long_token_share=0.7).keep_short is None


def test_named_sources():
    assert named_sources(BASE) is None
    assert "ArXiv" in (
        named_sources(dataclasses.replace(BASE, source_shares="slimpajama")) or set()
    )
    assert named_sources(dataclasses.replace(BASE, source_shares={"a": 1})) == {"a"}
