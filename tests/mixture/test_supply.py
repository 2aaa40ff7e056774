"""Random corpora: the share of long documents is met or explained, and the budget named is the largest."""

import dataclasses
import re

import numpy as np
import pytest

from megatron_long.mixture.admission import Admission, Limits
from megatron_long.mixture.corpus_stats import CorpusStats, SourceStats
from megatron_long.mixture.mixture import Mixture
from megatron_long.mixture.plan import TooTight, _rough_shares, make_plan
from megatron_long.mixture.rows import ROW_DTYPE
from megatron_long.mixture.selection import Cut, Group
from megatron_long.mixture.supply import TooLittle, _long_and_short
from tests.mixture.test_plan import OVERHEAD, places, write_folder

THRESHOLD = 1000
SEEDS = range(12)
KINDS = {
    "mixed": lambda g, n: np.where(g.random(n) < 0.1, long(g, n), short(g, n)),
    "short": lambda g, n: np.where(g.random(n) < 0.004, long(g, n), short(g, n)),
    "long": lambda g, n: np.where(g.random(n) < 0.8, long(g, n), short(g, n)),
    "even": lambda g, n: np.where(g.random(n) < 0.25, g.integers(1000, 1100, n), short(g, n)),
    "books": lambda g, n: np.where(
        np.arange(n) % 200 == 0, g.integers(30_000, 300_000, n), short(g, n)
    ),
    "only short": lambda g, n: short(g, n),
}


def long(generator, count):
    return np.minimum(1000 * (1 + generator.pareto(1.2, count)), 100_000).astype(int)


def short(generator, count):
    return generator.integers(10, 1000, count)


def random_corpus(seed, *, kinds=KINDS, largest=3000):
    """Two to nine sources of 200 documents and more, each of one kind."""
    generator = np.random.default_rng(seed)
    parts = []
    for source in range(generator.integers(2, 10)):
        count = int(generator.integers(200, largest))
        lengths = kinds[generator.choice(list(kinds))](generator, count)
        rows = np.zeros(count, ROW_DTYPE)
        rows["source"], rows["length_tokens"] = source, lengths
        parts.append(rows)
    return with_keys(np.concatenate(parts), generator)


def with_keys(corpus, generator):
    corpus["line"] = np.arange(len(corpus))
    corpus["offset"] = np.cumsum(corpus["length_tokens"]) - corpus["length_tokens"]
    for key in ("drop_key", "order_key"):
        corpus[key] = generator.integers(0, 2**64, len(corpus), dtype=np.uint64)
    return corpus


def is_admitted(corpus, admission):
    """Mark the documents that the first stage leaves rows of."""
    admitted = np.zeros(len(corpus), bool)
    is_long = corpus["length_tokens"] >= THRESHOLD
    for source in np.unique(corpus["source"]):
        limits = admission.limits(f"s{source}")
        order, drop = corpus["order_key"] / 2.0**64, corpus["drop_key"] / 2.0**64
        trained = (order <= limits.order) & (is_long | (drop <= limits.keep_short))
        admitted |= (corpus["source"] == source) & (trained | (order <= limits.valid))
    return admitted


@pytest.fixture
def plan_of(tmp_path):
    """A function that makes the plan of a corpus of one file given as rows."""
    numbers = iter(range(1000))

    def plan(corpus, mixture, admission=None):
        top = tmp_path / str(next(numbers))
        names = [f"s{number}" for number in range(int(corpus["source"].max()) + 1)]
        folder = write_folder(top / "0", corpus, corpus["length_tokens"], names)
        corpus[is_admitted(corpus, admission or Admission())].tofile(folder / "rows.npy")
        (top / "plan").mkdir()
        return make_plan([folder], mixture, admission or Admission(), OVERHEAD, top / "plan")

    return plan


def mixture_of(corpus, share_of_corpus, **changes):
    tokens = int(corpus["length_tokens"].astype(int).sum() * share_of_corpus)
    options = {"long_threshold_tokens": THRESHOLD, "valid_tokens_per_source": 5000, **changes}
    return Mixture(train_tokens=tokens, **options)


def allowed_to_miss(info, plan, corpus, mixture, index):
    """Whether the documents of a source cannot give it the share."""
    mine = corpus["source"] == index
    held = plan.valid.get(f"s{index}", np.zeros(0, ROW_DTYPE))["line"].astype(int)
    mine[held] = False
    lengths = np.sort(corpus[mine], order="order_key")["length_tokens"].astype(int)
    is_long = lengths >= THRESHOLD
    long_tokens, short_tokens = lengths[is_long].sum(), lengths[~is_long].sum()
    target, budget, passes = mixture.long_token_share, info.tokens_kept, mixture.allow_repeat
    # The first long documents that meet the share, where even cut to the threshold they exceed it.
    count = np.searchsorted(np.cumsum(lengths[is_long]), target * budget) + 1
    is_coarse = budget < 100 * THRESHOLD and (passes > 1 or count * THRESHOLD > target * budget)
    return (
        passes * long_tokens < (target - 0.005) * budget
        or passes * short_tokens < (1 - target - 0.005) * budget
        or (info.long_share_after > target and info.long_share_before >= target)
        or is_coarse
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("target", [0.3, 0.7])
def test_long_token_share_is_met_or_explained(target, seed, plan_of):
    corpus = random_corpus(seed)
    for share_of_corpus, repeat in ((0.02, 1), (0.2, 1), (0.6, 1), (0.8, 2), (1.7, 3)):
        mixture = mixture_of(corpus, share_of_corpus, long_token_share=target, allow_repeat=repeat)
        plan = plan_of(corpus, mixture)
        assert plan.order["length_tokens"].sum() == mixture.train_tokens
        for name, info in plan.sources.items():
            told = [text for text in plan.warnings if text.startswith(f"{name}: ")]
            if abs(info.long_share_after - target) <= 0.005:
                assert told == []
                continue
            assert len(told) == 1
            assert f"{name}: {info.long_share_after:.1%} of the tokens" in told[0]
            assert re.search(r"out of reach \(.+\)$", told[0])
            assert allowed_to_miss(info, plan, corpus, mixture, info.index), told


@pytest.mark.parametrize("seed", SEEDS)
def test_limits_never_change_the_choice(seed, plan_of):
    """What is not tokenized at first is asked for where it is needed, counted apart or not."""
    corpus = random_corpus(seed, largest=1000)
    names = [f"s{number}" for number in range(int(corpus["source"].max()) + 1)]
    for share_of_corpus, repeat in ((0.05, 1), (0.2, 1), (0.8, 3)):
        mixture = mixture_of(corpus, share_of_corpus, long_token_share=0.7, allow_repeat=repeat)
        mixture = dataclasses.replace(mixture, source_shares=dict.fromkeys(names, 1.0))
        try:
            whole = plan_of(corpus, mixture)
        except TooLittle:
            continue
        admission = Admission(default=Limits(0.3, 0.2, 0.1))
        while True:
            try:
                limited = plan_of(corpus, mixture, admission)
                break
            except TooTight as tight:
                admission = admission.widened(tight.wider)
        assert places(limited.order) == places(whole.order)
        assert limited.warnings == whole.warnings


OPTIONS = {
    "per-source": {},
    "ratio 0.5": {"short_keep_ratio": 0.5},
    "original": {"strategy": "original"},
    "cut": {"strategy": "cut", "cut_length_tokens": 100},
    "global": {"strategy": "global"},
    "long share": {"long_token_share": 0.7},
    "repeated": {"allow_repeat": 3},
    "repeated long share": {"allow_repeat": 2, "long_token_share": 0.7},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("is_natural", [True, False])
def test_the_budget_of_the_message_is_the_largest_that_works(is_natural, options, seed, plan_of):
    corpus = random_corpus(seed, largest=800)
    mixture = mixture_of(corpus, 50, **options)
    if not is_natural and mixture.strategy != "global":
        generator = np.random.default_rng(seed)
        shares = {f"s{k}": float(generator.random()) for k in range(corpus["source"].max() + 1)}
        mixture = dataclasses.replace(mixture, source_shares=shares)
    with pytest.raises(TooLittle) as failure:
        plan_of(corpus, mixture)
    most = int(re.search(r"use at most --train-tokens (\d+)", str(failure.value))[1])
    plan = plan_of(corpus, dataclasses.replace(mixture, train_tokens=most))
    assert plan.order["length_tokens"].sum() == most
    with pytest.raises(TooLittle):
        plan_of(corpus, dataclasses.replace(mixture, train_tokens=int(1.03 * most)))


def with_tiny(lengths, seed=0):
    """A corpus of two sources and a third one with documents of these lengths."""
    corpus = random_corpus(seed, kinds={"mixed": KINDS["mixed"]})
    corpus = corpus[corpus["source"] < 2]
    tiny = np.zeros(len(lengths), ROW_DTYPE)
    tiny["source"], tiny["length_tokens"] = 2, lengths
    return with_keys(np.concatenate([corpus, tiny]), np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lengths", [[50], [50, 60], [900, 20], [3000, 40], [40, 50, 60, 70]])
@pytest.mark.parametrize("share_of_corpus", [0.001, 0.1])
@pytest.mark.parametrize("options", [{}, {"long_token_share": 0.7}, {"short_keep_ratio": 0.0}])
def test_a_tiny_source_stops_no_corpus(options, share_of_corpus, lengths, seed, plan_of):
    corpus = with_tiny(lengths, seed)
    mixture = mixture_of(corpus, share_of_corpus, **options)
    plan = plan_of(corpus, mixture)
    assert plan.order["length_tokens"].sum() == mixture.train_tokens
    info = plan.sources["s2"]
    told = [
        text for text in plan.warnings if text.startswith("s2: ") and "out of reach" not in text
    ]
    natural = info.tokens_in / corpus["length_tokens"].sum()
    if not told:
        assert info.share_asked == pytest.approx(natural)
    elif "left out of the mixture" in told[0]:
        assert info.documents_kept == 0
        assert sum(source.share_got for source in plan.sources.values()) == pytest.approx(1)
        for name in ("s0", "s1"):
            before = plan.sources[name].tokens_in / corpus["length_tokens"].sum()
            assert plan.sources[name].share_got == pytest.approx(before, abs=0.01)
    else:
        assert "nothing is held out" in told[0]
        assert info.documents_valid == 0
        assert "s2" not in plan.valid
        assert info.share_asked == pytest.approx(natural)


def test_a_tiny_source_does_not_lower_the_budget_of_the_message(plan_of):
    corpus = with_tiny([50])
    without = corpus[corpus["source"] < 2]
    found = []
    for rows in (corpus, without):
        with pytest.raises(TooLittle) as failure:
            plan_of(rows, mixture_of(corpus, 20))
        found.append(int(re.search(r"at most --train-tokens (\d+)", str(failure.value))[1]))
    assert found[0] == pytest.approx(found[1], rel=0.01)
    assert plan_of(corpus, dataclasses.replace(mixture_of(corpus, 1), train_tokens=found[0]))


def test_a_source_of_many_short_documents_is_not_left_out(plan_of):
    corpus = with_tiny([20] * 100)
    with pytest.raises(TooLittle, match=r"s2: \d+ tokens available, 1,\d+ asked"):
        plan_of(corpus, mixture_of(corpus, 0.5, short_keep_ratio=0.1))


def test_a_tiny_source_with_a_share_of_its_own_is_an_error(plan_of):
    mixture = mixture_of(with_tiny([50]), 0.1, source_shares={"s0": 0.5, "s1": 0.4, "s2": 0.1})
    with pytest.raises(TooLittle, match=r"s2: 0 tokens available.* with 0 for s2"):
        plan_of(with_tiny([50]), dataclasses.replace(mixture, short_keep_ratio=0.0))


@pytest.mark.parametrize(("asked", "shown"), [(2 * 10**8, "200M"), (200_000_001, "200000001")])
def test_the_message_shows_the_number_that_was_typed(asked, shown, plan_of):
    with pytest.raises(TooLittle, match=rf"^--train-tokens {shown} is more than the corpus"):
        plan_of(
            with_tiny([50]), dataclasses.replace(mixture_of(with_tiny([50]), 1), train_tokens=asked)
        )


def test_a_source_that_is_left_out_has_no_rough_share():
    assert not list(_rough_shares({"tiny": 0.0}, {"tiny": 1e-9}))
    assert len(list(_rough_shares({"big": 0.5}, {"big": 0.1}))) == 1


@pytest.mark.parametrize(("tokenized", "expected"), [(10, (30, 10)), (4, (900, 100))])
def test_the_reason_of_a_missed_share_counts_the_corpus(tokenized, expected):
    """Rows are what a survey admitted, where not every document was tokenized."""
    rows = np.zeros(2, ROW_DTYPE)
    rows["length_tokens"] = (30, 10)
    group = Group(["a"], rows, 0, 20, Cut(2))
    source = SourceStats(documents=10, documents_tokenized=tokenized, tokens=1000, long_tokens=900)
    stats = CorpusStats({"a": source}, 0, 0, 0, [], 0)
    assert _long_and_short(group, stats) == expected
