import pytest

from megatron_long.errors import ConfigError
from megatron_long.mixture.shares import (
    SLIMPAJAMA_SHARES,
    parse_token_count,
    read_shares,
    resolve_shares,
    split_budget,
)

TOKENS_IN = {"Book": 300, "C4": 100}


@pytest.mark.parametrize(
    ("text", "count"),
    [("5B", 5 * 10**9), ("64m", 64 * 10**6), ("200K", 200_000), ("1.1B", 1_100_000_000), ("7", 7)],
)
def test_counts(text, count):
    assert parse_token_count(text) == count


@pytest.mark.parametrize(
    "text", ["", "5G", "-5", "1e9", "B", "5 000", "1.0005K", "0.5", "5BB", "٥"]
)
def test_malformed_counts(text):
    with pytest.raises(ConfigError, match=r"--train-tokens .*optional K, M or B"):
        parse_token_count(text)


def test_budgets_sum_and_are_within_one_token_of_the_share():
    for total in (1, 7, 1000, 5 * 10**9 + 1):
        shares = resolve_shares("slimpajama", "error", dict.fromkeys(SLIMPAJAMA_SHARES, 1))
        budgets = split_budget(total, shares)
        assert sum(budgets.values()) == total
        assert all(abs(budgets[name] - total * share) < 1 for name, share in shares.items())


def test_natural_shares_are_those_of_the_corpus():
    assert resolve_shares("natural", "error", TOKENS_IN) == {"Book": 0.75, "C4": 0.25}


def test_shares_of_absent_sources():
    with pytest.raises(
        ConfigError,
        match=r"names CommonCrawl, GitHub, .* lacks .* Book, C4.*--missing-sources drop",
    ):
        resolve_shares("slimpajama", "error", TOKENS_IN)
    shares = resolve_shares("slimpajama", "drop", TOKENS_IN)
    assert shares["C4"] / shares["Book"] == pytest.approx(0.26609933 / 0.0414836)
    assert sum(shares.values()) == pytest.approx(1)


def test_sources_without_a_share():
    with pytest.raises(ConfigError, match="gives no share to C4"):
        resolve_shares({"Book": 1.0}, "error", TOKENS_IN)
    assert resolve_shares({"Book": 2.0, "C4": 0.0}, "error", TOKENS_IN) == {"Book": 1.0, "C4": 0.0}
    with pytest.raises(ConfigError, match="a share above 0"):
        resolve_shares({"Book": 0.0, "C4": 0.0}, "error", TOKENS_IN)


def test_yaml_shares(tmp_path):
    path = tmp_path / "shares.yaml"
    path.write_text("shares: {RedPajamaBook: 3, Patents: 1.5}\nmissing_sources: drop\n", "utf-8")
    assert read_shares(path) == ({"Book": 3.0, "Patents": 1.5}, "drop")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("shares: [a", "is not YAML"),
        ("Book: 1", "has the key Book"),
        ("shares: {Book: 1}\nmising: drop", "has the key mising"),
        ("shares: {Book: many}", "share of Book is 'many'"),
        ("shares: {Book: -1}", "share of Book is -1"),
        ("shares: {Book: .nan}", "share of Book is nan"),
        ("shares: {Book: .inf}", "share of Book is inf"),
        ("shares: {Book: 9" + "9" * 400 + "}", "share of Book is 9999"),
        ("shares: {}", "has no mapping under shares"),
        ("shares: {Book: 1, RedPajamaBook: 2}", "Book twice"),
    ],
)
def test_bad_yaml(tmp_path, content, message):
    path = tmp_path / "shares.yaml"
    path.write_text(content, "utf-8")
    with pytest.raises(ConfigError, match=message):
        read_shares(path)
    with pytest.raises(ConfigError, match="does not exist"):
        read_shares(tmp_path / "none.yaml")
