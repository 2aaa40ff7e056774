import dataclasses

import numpy as np
import pytest

from megatron_long.data.mixture import CORPUS_DTYPE, Mixture, plan_mixture
from megatron_long.errors import ConfigError, DataError

SOURCES = ["Book", "C4"]
BASE = Mixture(train_tokens=300_000, long_threshold_tokens=1000, valid_tokens_per_source=5000)


def make_corpus(num_documents=4000, seed=0):
    """Half of the documents are of each source; one in ten of Book and one in forty of C4 is long."""
    generator = np.random.default_rng(seed)
    corpus = np.zeros(num_documents, CORPUS_DTYPE)
    corpus["source"] = np.arange(num_documents) % 2
    corpus["line"] = np.arange(num_documents) // 3 + 1
    corpus["file"] = np.arange(num_documents) % 3
    is_long = generator.random(num_documents) < np.where(corpus["source"] == 0, 0.1, 0.025)
    short = generator.integers(10, 1000, num_documents)
    long = generator.integers(1000, 9000, num_documents)
    corpus["length_tokens"] = np.where(is_long, long, short)
    for key in ("drop_key", "order_key"):
        corpus[key] = generator.integers(0, 2**64, num_documents, dtype=np.uint64)
    return corpus


def tokens_by_source(corpus, plan):
    sources = corpus["source"][plan.rows["document"]]
    lengths = plan.rows["length_tokens"].astype(float)
    return np.bincount(sources, lengths, minlength=len(SOURCES)).tolist()


@pytest.mark.parametrize("strategy", ["per-source", "original"])
@pytest.mark.parametrize("shares", ["natural", {"Book": 0.123, "C4": 0.877}])
def test_budgets_are_exact(strategy, shares):
    corpus = make_corpus()
    mixture = dataclasses.replace(BASE, strategy=strategy, source_shares=shares)
    plan = plan_mixture(corpus, SOURCES, mixture)
    got = tokens_by_source(corpus, plan)
    assert sum(got) == mixture.train_tokens
    for tokens, info in zip(got, plan.sources.values(), strict=True):
        assert abs(tokens - info.share_asked * mixture.train_tokens) < 1
        assert info.share_got == tokens / mixture.train_tokens


def test_natural_shares_survive_length_upsampling():
    corpus = make_corpus()
    plan = plan_mixture(corpus, SOURCES, BASE)
    natural = np.bincount(corpus["source"], corpus["length_tokens"].astype(float))
    got = np.array(tokens_by_source(corpus, plan)) / BASE.train_tokens
    np.testing.assert_allclose(got, natural / natural.sum(), atol=1e-5)
    for info in plan.sources.values():
        assert info.long_share_after > info.long_share_before + 0.2


def test_one_cut_document_per_source_at_most():
    corpus = make_corpus()
    plan = plan_mixture(corpus, SOURCES, BASE)
    whole = corpus["length_tokens"][plan.rows["document"]]
    is_cut = plan.rows["length_tokens"] < whole
    assert (plan.rows["length_tokens"] <= whole).all()
    assert np.bincount(corpus["source"][plan.rows["document"]][is_cut]).max() <= 1
    assert len(np.unique(plan.rows["document"])) == len(plan.rows)


def test_short_documents_are_dropped_at_the_ratio_and_long_ones_never():
    corpus = make_corpus(20_000)
    # The whole supply: ask for what is there.
    with pytest.raises(DataError) as failure:
        plan_mixture(corpus, SOURCES, dataclasses.replace(BASE, train_tokens=10**9))
    most = int(str(failure.value).split("at most --train-tokens ")[1].split(",")[0])
    mixture = dataclasses.replace(BASE, train_tokens=most)
    plan = plan_mixture(corpus, SOURCES, mixture)
    taken = np.zeros(len(corpus), bool)
    taken[plan.rows["document"]] = True
    held_out = np.zeros(len(corpus), bool)
    held_out[np.concatenate(list(plan.valid.values()))] = True
    # The source that limits the total is used up, but for rounding.
    used_up = max(range(2), key=lambda index: plan.sources[SOURCES[index]].documents_kept)
    rest = (corpus["source"] == used_up) & ~held_out
    is_long = corpus["length_tokens"] >= BASE.long_threshold_tokens
    assert (rest & is_long & ~taken).sum() <= 1
    assert (rest & ~is_long & taken).sum() / (rest & ~is_long).sum() == pytest.approx(0.1, abs=0.01)


def test_cutting_at_the_budget_does_not_prefer_short_or_long_documents():
    corpus = make_corpus(40_000)
    mixture = dataclasses.replace(BASE, source_shares={"Book": 1, "C4": 0}, short_keep_ratio=0.3)
    shares = [
        plan_mixture(corpus, SOURCES, dataclasses.replace(mixture, train_tokens=tokens))
        .sources["Book"]
        .long_share_after
        for tokens in (400_000, 4_000_000)
    ]
    assert shares[0] == pytest.approx(shares[1], abs=0.1)


def test_training_order_mixes_sources_and_lengths():
    corpus = make_corpus(20_000)
    mixture = dataclasses.replace(BASE, train_tokens=3_000_000, short_keep_ratio=0.5)
    rows = plan_mixture(corpus, SOURCES, mixture).rows
    halves = np.array_split(rows, 2)
    for value in (corpus["source"][rows["document"]] == 0, rows["length_tokens"] >= 1000):
        first, second = (part.mean() for part in np.array_split(value, 2))
        assert first == pytest.approx(second, abs=0.05)
    assert abs(halves[0]["document"].mean() - halves[1]["document"].mean()) < 1000


def test_order_of_reading_changes_nothing():
    corpus = make_corpus()
    shuffled = np.random.default_rng(1).permutation(len(corpus))
    first = plan_mixture(corpus, SOURCES, BASE)
    second = plan_mixture(corpus[shuffled], SOURCES, BASE)
    columns = ["source", "file", "line"]
    np.testing.assert_array_equal(
        corpus[first.rows["document"]][columns], corpus[shuffled][second.rows["document"]][columns]
    )
    assert first.sources == second.sources


def test_validation_is_disjoint_natural_and_near_its_size():
    corpus = make_corpus(20_000)
    plan = plan_mixture(corpus, SOURCES, BASE)
    for index, (name, rows) in enumerate(plan.valid.items()):
        assert SOURCES[index] == name
        assert not set(rows.tolist()) & set(plan.rows["document"].tolist())
        info = plan.sources[name]
        assert info.tokens_valid == corpus["length_tokens"][rows].sum()
        assert 5000 <= info.tokens_valid < 5000 + 9000


def valid_lengths(lengths, target):
    corpus = np.zeros(len(lengths), CORPUS_DTYPE)
    corpus["length_tokens"], corpus["order_key"] = lengths, np.arange(len(lengths))
    mixture = Mixture(train_tokens=1, strategy="original", valid_tokens_per_source=target)
    plan = plan_mixture(corpus, ["x"], mixture)
    return [lengths[row] for row in plan.valid.get("x", [])]


def test_validation_limits():
    assert valid_lengths([40] * 100, 100) == [40, 40, 40]
    assert valid_lengths([40] * 10, 10**6) == [40]
    assert valid_lengths([900, 50, 40, 200, 10], 10**6) == [50, 40, 10]
    assert valid_lengths([90, 50, 60], 10**6) == [50]
    assert valid_lengths([90], 10**6) == []
    assert valid_lengths([90, 90], 0) == []


def test_repetition():
    corpus = make_corpus(200)
    available = int(corpus["length_tokens"].sum())
    base = Mixture(train_tokens=2 * available + 77, strategy="original", valid_tokens_per_source=0)
    with pytest.raises(DataError, match=r"Book: .* available, .* asked; C4: .*--allow-repeat 3"):
        plan_mixture(corpus, SOURCES, base)
    plan = plan_mixture(corpus, SOURCES, dataclasses.replace(base, allow_repeat=3))
    assert plan.rows["length_tokens"].sum() == base.train_tokens
    uses = np.bincount(plan.rows["document"].astype(np.int64))
    assert set(uses.tolist()) == {2, 3}
    # Passes are mixed, each in its own order.
    first, second = (plan.rows["document"][plan.rows["repeat"] == index] for index in (0, 1))
    assert sorted(first) == sorted(second)
    assert first.tolist() != second.tolist()


def test_shortage_names_source_numbers_and_remedies():
    corpus = make_corpus()
    mixture = dataclasses.replace(BASE, source_shares={"Book": 0.01, "C4": 0.99})
    with pytest.raises(DataError) as failure:
        plan_mixture(corpus, SOURCES, dataclasses.replace(mixture, train_tokens=5_000_000))
    message = str(failure.value)
    assert "C4: " in message
    assert "Book: " not in message
    assert "4,950,000 asked" in message
    for remedy in ("--train-tokens", "--source-shares", "--short-keep-ratio", "--allow-repeat"):
        assert remedy in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "best"}, "--strategy best: choose one of per-source, original"),
        ({"short_keep_ratio": 1.5}, r"--short-keep-ratio 1\.5"),
        ({"train_tokens": 0}, "--train-tokens 0 is too small"),
        ({"long_threshold_tokens": 0}, "--long-threshold 0 is too small"),
        ({"valid_tokens_per_source": -1}, "--valid-tokens-per-source -1 is too small"),
        ({"allow_repeat": 0}, "--allow-repeat 0 is too small"),
        ({"source_shares": "slim"}, "--source-shares slim: use natural, slimpajama"),
        ({"missing_sources": "skip"}, "missing_sources is 'skip'"),
    ],
)
def test_mixture_checks_itself(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(BASE, **changes)
