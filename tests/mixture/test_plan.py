"""Plans made of metadata alone: no text is tokenized here."""

import dataclasses
import hashlib

import numpy as np
import orjson
import pytest

from megatron_long.errors import ConfigError, DataError
from megatron_long.mixture import external_sort
from megatron_long.mixture.admission import Admission, Limits
from megatron_long.mixture.mixture import Mixture
from megatron_long.mixture.plan import TooTight, make_plan
from megatron_long.mixture.rows import ROW_DTYPE

SOURCES = ["Book", "C4"]
OVERHEAD = 2
BASE = Mixture(train_tokens=300_000, long_threshold_tokens=1000, valid_tokens_per_source=5000)


def make_corpus(num_documents=4000, seed=0):
    """Half of the documents are of each source; one in ten of Book and one in forty of C4 is long."""
    generator = np.random.default_rng(seed)
    corpus = np.zeros(num_documents, ROW_DTYPE)
    corpus["source"] = np.arange(num_documents) % 2
    corpus["line"] = np.arange(num_documents) // 3 + 1
    corpus["file"] = np.arange(num_documents) % 3
    is_long = generator.random(num_documents) < np.where(corpus["source"] == 0, 0.1, 0.025)
    short = generator.integers(10, 1000, num_documents)
    long = generator.integers(1000, 9000, num_documents)
    corpus["length_tokens"] = np.where(is_long, long, short)
    corpus["offset"] = np.cumsum(corpus["length_tokens"]) - corpus["length_tokens"]
    for key in ("drop_key", "order_key"):
        corpus[key] = generator.integers(0, 2**64, num_documents, dtype=np.uint64)
    return corpus


def write_folder(folder, rows, lengths, sources):
    """Leave what the first stage leaves of a file, every document tokenized."""
    folder.mkdir(parents=True)
    rows.tofile(folder / "rows.npy")
    strata, by_length = [], []
    for source in range(len(sources)):
        mine = lengths[rows["source"] == source].astype(np.int64)
        long = int(mine[mine >= BASE.long_threshold_tokens].sum())
        count, size_bytes = len(mine), int(4 * mine.sum())
        squares = [0] * 5  # only needed for errors, and there are none
        row = [count, size_bytes, count, size_bytes, long, int(mine.sum()), *squares]
        strata.append([source, 0, 12, *row])
        buckets = np.bincount(np.log2(mine).astype(int), mine).astype(int).tolist()
        by_length += [[source, 0, 12, k, n] for k, n in enumerate(buckets) if n]
    info = {"sources": sources, "strata": strata, "lengths": by_length, "bad": []}
    info |= {"documents_empty": 0, "documents_bad": 0, "text_bytes": 0}
    (folder / "info.json").write_bytes(orjson.dumps(info))
    return folder


@pytest.fixture
def plan_of(tmp_path):
    """A function that makes the plan of a corpus given as rows."""
    numbers = iter(range(1000))

    def plan(corpus, mixture, *, sources=SOURCES, admission=None, swap=False):
        top = tmp_path / str(next(numbers))
        folders = []
        for file in range(int(corpus["file"].max()) + 1):
            rows = corpus[corpus["file"] == file].copy()
            names = list(sources)
            if swap and file == 1:  # each file counts sources by itself
                rows["source"], names = len(sources) - 1 - rows["source"], names[::-1]
            folders.append(write_folder(top / str(file), rows, rows["length_tokens"], names))
        (top / "plan").mkdir()
        return make_plan(folders, mixture, admission or Admission(), OVERHEAD, top / "plan")

    return plan


def places(rows):
    return list(
        zip(rows["file"].tolist(), rows["line"].tolist(), rows["source"].tolist(), strict=True)
    )


def row_of(corpus):
    """Row number of the corpus by file, line and source."""
    return {place: index for index, place in enumerate(places(corpus))}


def tokens_by_source(plan):
    lengths = plan.order["length_tokens"].astype(float)
    return np.bincount(plan.order["source"], lengths, minlength=len(SOURCES)).tolist()


@pytest.mark.parametrize("strategy", ["per-source", "original", "cut"])
@pytest.mark.parametrize("shares", ["natural", {"Book": 0.123, "C4": 0.877}])
def test_budgets_are_exact(strategy, shares, plan_of):
    mixture = dataclasses.replace(
        BASE, strategy=strategy, source_shares=shares, cut_length_tokens=500
    )
    plan = plan_of(make_corpus(), mixture)
    got = tokens_by_source(plan)
    assert sum(got) == mixture.train_tokens
    for tokens, info in zip(got, plan.sources.values(), strict=True):
        assert abs(tokens - info.share_asked * mixture.train_tokens) < 1
        assert info.share_got == tokens / mixture.train_tokens
        assert info.tokens_kept == tokens == sum(info.tokens_by_length_after)


def test_natural_shares_survive_length_upsampling(plan_of):
    corpus = make_corpus()
    plan = plan_of(corpus, BASE)
    natural = np.bincount(corpus["source"], corpus["length_tokens"].astype(float))
    got = np.array(tokens_by_source(plan)) / BASE.train_tokens
    np.testing.assert_allclose(got, natural / natural.sum(), atol=1e-5)
    for info in plan.sources.values():
        assert info.long_share_after > info.long_share_before + 0.2


def test_one_cut_document_per_source_at_most(plan_of):
    corpus = make_corpus()
    plan, rows = plan_of(corpus, BASE), row_of(corpus)
    index = [rows[place] for place in places(plan.order)]
    whole = corpus["length_tokens"][index]
    is_cut = plan.order["length_tokens"] < whole
    assert (plan.order["length_tokens"] <= whole).all()
    assert (plan.order["offset"] == corpus["offset"][index]).all()
    assert np.bincount(plan.order["source"][is_cut]).max() <= 1
    assert len(set(index)) == len(index)


def test_short_documents_are_dropped_at_the_ratio_and_long_ones_never(plan_of):
    corpus = make_corpus(20_000)
    # The whole supply: ask for what is there.
    with pytest.raises(DataError) as failure:
        plan_of(corpus, dataclasses.replace(BASE, train_tokens=10**9))
    most = int(str(failure.value).split("at most --train-tokens ")[1].split()[0].strip(","))
    plan, rows = plan_of(corpus, dataclasses.replace(BASE, train_tokens=most)), row_of(corpus)
    taken, held_out = np.zeros((2, len(corpus)), bool)
    taken[[rows[place] for place in places(plan.order)]] = True
    for held in plan.valid.values():
        held_out[[rows[place] for place in places(held)]] = True
    # The source that limits the total is used up, but for rounding.
    used_up = max(range(2), key=lambda index: plan.sources[SOURCES[index]].documents_kept)
    rest = (corpus["source"] == used_up) & ~held_out
    is_long = corpus["length_tokens"] >= BASE.long_threshold_tokens
    assert (rest & is_long & ~taken).sum() <= 1
    assert (rest & ~is_long & taken).sum() / (rest & ~is_long).sum() == pytest.approx(0.1, abs=0.01)
    info = plan.sources[SOURCES[used_up]]
    assert info.documents_dropped == (rest & ~taken).sum()


def test_cutting_at_the_budget_does_not_prefer_short_or_long_documents(plan_of):
    corpus = make_corpus(40_000)
    mixture = dataclasses.replace(BASE, source_shares={"Book": 1, "C4": 0}, short_keep_ratio=0.3)
    shares = [
        plan_of(corpus, dataclasses.replace(mixture, train_tokens=tokens))
        .sources["Book"]
        .long_share_after
        for tokens in (400_000, 4_000_000)
    ]
    assert shares[0] == pytest.approx(shares[1], abs=0.1)


def test_chunks_and_the_numbering_of_sources_change_nothing(plan_of, monkeypatch):
    corpus = make_corpus()
    mixture = dataclasses.replace(BASE, long_token_share=0.6)
    first = plan_of(corpus, mixture)
    monkeypatch.setattr(external_sort, "CHUNK_ROWS", 64)
    second = plan_of(corpus, mixture, swap=True)
    assert places(first.order) == places(second.order)
    assert first.sources == second.sources
    assert first.evenness.largest_deviation == pytest.approx(second.evenness.largest_deviation)


def test_validation_is_disjoint_natural_and_near_its_size(plan_of):
    plan = plan_of(make_corpus(20_000), BASE)
    for index, (name, held) in enumerate(plan.valid.items()):
        assert SOURCES[index] == name
        assert not set(places(held)) & set(places(plan.order))
        info = plan.sources[name]
        assert info.tokens_valid == held["length_tokens"].sum()
        assert 5000 <= info.tokens_valid < 5000 + 9000


def valid_lengths(plan_of, lengths, target):
    corpus = np.zeros(len(lengths), ROW_DTYPE)
    corpus["length_tokens"], corpus["order_key"] = lengths, np.arange(len(lengths))
    corpus["line"] = np.arange(len(lengths))
    mixture = Mixture(train_tokens=1, strategy="original", valid_tokens_per_source=target)
    plan = plan_of(corpus, mixture, sources=["x"])
    return [lengths[row["line"]] for row in plan.valid.get("x", [])]


def test_validation_limits(plan_of):
    assert valid_lengths(plan_of, [40] * 100, 100) == [40, 40, 40]
    assert valid_lengths(plan_of, [40] * 10, 10**6) == [40]
    assert valid_lengths(plan_of, [900, 50, 40, 200, 10], 10**6) == [50, 40, 10]
    assert valid_lengths(plan_of, [90, 50, 60], 10**6) == [50]
    assert valid_lengths(plan_of, [90], 10**6) == []
    assert valid_lengths(plan_of, [90, 90], 0) == []


def test_repetition_takes_whole_passes(plan_of):
    corpus = make_corpus(200)
    available = int(corpus["length_tokens"].sum())
    base = Mixture(train_tokens=2 * available + 77, strategy="original", valid_tokens_per_source=0)
    with pytest.raises(DataError, match=r"Book: .* available, .* asked; C4: .*--allow-repeat 3"):
        plan_of(corpus, base)
    plan, rows = plan_of(corpus, dataclasses.replace(base, allow_repeat=3)), row_of(corpus)
    assert plan.order["length_tokens"].sum() == base.train_tokens
    index = np.array([rows[place] for place in places(plan.order)])
    assert set(np.bincount(index).tolist()) == {2, 3}
    # One pass after another in each source, each in its own order.
    for source in range(2):
        mine = plan.order["source"] == source
        repeat = plan.order["repeat"][mine]
        assert (np.diff(repeat.astype(int)) >= 0).all()
        first, second = (index[mine][repeat == number] for number in (0, 1))
        assert sorted(first) == sorted(second)
        assert first.tolist() != second.tolist()
    info = plan.sources["Book"]
    assert info.passes == 3
    assert info.documents_repeated == info.documents_kept - 100
    assert info.documents_dropped == 0


def test_remedies_of_a_source_with_nothing_left_work(plan_of):
    corpus = make_corpus()
    is_c4 = corpus["source"] == 1
    corpus["length_tokens"][is_c4] = np.minimum(corpus["length_tokens"][is_c4], 900)
    mixture = dataclasses.replace(BASE, train_tokens=20_000, short_keep_ratio=0.0)
    with pytest.raises(DataError) as failure:
        plan_of(corpus, mixture)
    told = str(failure.value).split("; use ")[1]
    assert told == "other --source-shares with 0 for C4 or a higher --short-keep-ratio"
    without = {"Book": 1.0, "C4": 0.0}
    for works in ({"source_shares": without}, {"short_keep_ratio": 0.1}):
        assert plan_of(corpus, dataclasses.replace(mixture, **works)).order.size
    with pytest.raises(DataError) as failure:
        plan_of(corpus[is_c4], mixture)
    assert str(failure.value).endswith("; use a higher --short-keep-ratio")


def test_remedies_are_those_of_the_strategy(plan_of):
    mixture = dataclasses.replace(BASE, train_tokens=3_243_000, strategy="original")
    with pytest.raises(
        DataError, match=r"--train-tokens \d+, other --source-shares or --allow-rep"
    ):
        plan_of(make_corpus(), mixture)
    with pytest.raises(
        DataError, match=r"--train-tokens \d+, a higher --short-keep-ratio or --all"
    ):
        plan_of(
            make_corpus(), dataclasses.replace(mixture, strategy="global", train_tokens=3_000_000)
        )


def test_no_remedy_is_named_that_cannot_work(plan_of):
    """Neither other shares nor short documents make more of a corpus than it has."""
    mixture = dataclasses.replace(BASE, train_tokens=50_000_000)
    with pytest.raises(DataError, match=r"; use at most --train-tokens \d+ or --allow-repeat \d+$"):
        plan_of(make_corpus(), mixture)


def test_shortage_names_source_numbers_and_remedies(plan_of):
    mixture = dataclasses.replace(BASE, source_shares={"Book": 0.01, "C4": 0.99})
    with pytest.raises(DataError) as failure:
        plan_of(make_corpus(), dataclasses.replace(mixture, train_tokens=1_000_000))
    message = str(failure.value)
    assert "C4: " in message
    assert "Book: " not in message
    assert "990,000 asked" in message
    for remedy in ("--train-tokens", "--source-shares", "--short-keep-ratio", "--allow-repeat"):
        assert remedy in message


def test_long_token_share_is_solved_for_each_source(plan_of):
    corpus = make_corpus(40_000)
    mixture = dataclasses.replace(BASE, train_tokens=2_000_000, long_token_share=0.7)
    plan = plan_of(corpus, mixture)
    kept = [info.short_keep_ratio for info in plan.sources.values()]
    assert kept[0] > 2 * kept[1] > 0
    for info in plan.sources.values():
        assert info.long_share_after == pytest.approx(0.7, abs=0.005)
    assert plan.warnings == []


def test_a_source_above_the_long_share_stays_and_one_without_long_documents_is_reported(plan_of):
    corpus = make_corpus(20_000)
    is_c4 = corpus["source"] == 1
    corpus["length_tokens"][is_c4] = np.minimum(corpus["length_tokens"][is_c4], 999)
    mixture = dataclasses.replace(BASE, train_tokens=5_000_000, long_token_share=0.2)
    plan = plan_of(corpus, mixture)
    book, c4 = plan.sources["Book"], plan.sources["C4"]
    assert book.short_keep_ratio == c4.short_keep_ratio == 1.0
    assert book.long_share_after == pytest.approx(book.long_share_before, abs=0.1)
    assert plan.warnings == [
        f"Book: {book.long_share_after:.1%} of the tokens are in long documents, --long-token-share 0.2 is "
        "out of reach (it is 53.0% of all that can be used, and long ones are not dropped)",
        "C4: 0.0% of the tokens are in long documents, --long-token-share 0.2 is out of reach (it has "
        "none)",
    ]


def test_a_budget_that_needs_the_short_documents_is_filled_and_reported(plan_of):
    corpus = make_corpus(4000)
    total = int(corpus["length_tokens"].astype(int).sum())
    mixture = dataclasses.replace(BASE, train_tokens=int(0.8 * total), long_token_share=0.9)
    plan = plan_of(corpus, mixture)
    assert plan.order["length_tokens"].sum() == mixture.train_tokens
    assert len(plan.warnings) == 2
    assert "the budget needs the short ones" in plan.warnings[0]
    assert all(0.1 < info.short_keep_ratio < 1 for info in plan.sources.values())


def test_global_upsampling_lets_shares_follow_the_long_documents(plan_of):
    plan = plan_of(make_corpus(20_000), dataclasses.replace(BASE, strategy="global"))
    book = plan.sources["Book"]
    assert plan.order["length_tokens"].sum() == BASE.train_tokens
    assert book.share_got > book.tokens_in / sum(i.tokens_in for i in plan.sources.values()) + 0.05
    assert book.share_asked == book.share_got
    assert {info.short_keep_ratio for info in plan.sources.values()} == {0.1}
    assert sum(info.tokens_valid for info in plan.sources.values()) > 10_000


def test_cut_pieces_cover_documents_and_lie_apart(plan_of):
    corpus = make_corpus(300)
    lengths = corpus["length_tokens"].astype(int)
    room = 500 - OVERHEAD
    pieces = -(-(lengths - OVERHEAD) // room)
    total = int((lengths + (pieces - 1) * OVERHEAD).sum())
    shares = {name: float(1) for name in SOURCES}
    mixture = Mixture(
        train_tokens=total // 3,
        strategy="cut",
        cut_length_tokens=500,
        valid_tokens_per_source=0,
        source_shares=shares,
    )
    plan, rows = plan_of(corpus, mixture), row_of(corpus)
    assert plan.order["length_tokens"].max() == 500
    index = np.array([rows[place] for place in places(plan.order)])
    skipped = plan.order["offset"] - corpus["offset"][index]
    assert (skipped % room == 0).all()
    whole = np.minimum(lengths[index] - OVERHEAD - skipped, room) + OVERHEAD
    assert (plan.order["length_tokens"] < whole).sum() <= 2
    longest = index == np.argmax(np.bincount(index))
    assert (np.diff(np.flatnonzero(longest)) > 1).any()
    used = sum(info.documents_dropped for info in plan.sources.values())
    assert used == len(corpus) - len(set(index.tolist()))


def test_limits_that_are_too_tight_ask_for_another_round(plan_of):
    corpus = make_corpus(4000)
    few = corpus[corpus["order_key"] < np.uint64(2**60)]
    tight = Admission(default=Limits(1 / 16, 0.1, 1 / 16))
    with pytest.raises(TooTight) as failure:
        plan_of(few, BASE, admission=tight)
    assert set(failure.value.wider) <= set(SOURCES)
    assert all(limits.order > 1 / 16 for limits in failure.value.wider.values())


def test_limits_change_nothing_else(plan_of):
    corpus = make_corpus(20_000)
    mixture = dataclasses.replace(BASE, source_shares={"Book": 0.4, "C4": 0.6})
    half = corpus[corpus["order_key"] < np.uint64(2**63)]
    limited = plan_of(half, mixture, admission=Admission(default=Limits(0.5, 0.1, 0.5)))
    assert places(limited.order) == places(plan_of(corpus, mixture).order)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "420e208cc9707f5f"),
        ({"strategy": "original"}, "413deb1768cd8df6"),
        ({"strategy": "cut", "cut_length_tokens": 300}, "7d814bbf1c3afb0f"),
        ({"strategy": "global"}, "e3744195d5769f0e"),
        ({"long_token_share": 0.6}, "a20f42b3c83b3a48"),
        ({"long_token_share": 0.7, "strategy": "global"}, "3239bf1e082f5588"),
        ({"train_tokens": 12_000_000, "allow_repeat": 9}, "43348e61cf0ebdd6"),
    ],
)
def test_choices_are_those_of_version_0_1(changes, expected, plan_of):
    mixture = dataclasses.replace(BASE, **{"train_tokens": 2_000_000, **changes})
    plan = plan_of(make_corpus(40_000), mixture)
    assert plan.warnings == []
    assert hashlib.sha256(plan.order.tobytes()).hexdigest()[:16] == expected


SHORT_SHARE = dataclasses.replace(BASE, short_share=0.66, train_tokens=1_000_001)


@pytest.mark.parametrize("changes", [{}, {"long_token_share": 0.8}, {"short_keep_ratio": 0.0}])
def test_documents_as_they_are_lie_beside_the_upsampled_ones(changes, plan_of):
    corpus = make_corpus(20_000)
    mixture = dataclasses.replace(SHORT_SHARE, **changes)
    plan, rows = plan_of(corpus, mixture), row_of(corpus)
    assert sum(info.tokens_plain for info in plan.sources.values()) == round(0.66 * 1_000_001)
    assert plan.order["length_tokens"].sum() == mixture.train_tokens
    index = np.array([rows[place] for place in places(plan.order)])
    assert len(set(index.tolist())) == len(index)
    held = [rows[place] for name in SOURCES for place in places(plan.valid[name])]
    used = dict(zip(index.tolist(), plan.order["length_tokens"].tolist(), strict=True))
    for source, info in enumerate(plan.sources.values()):
        assert info.tokens_plain == pytest.approx(0.66 * info.tokens_kept, abs=1)
        # The truth: whole documents in key order, up to the budget.
        mine = np.setdiff1d(np.flatnonzero(corpus["source"] == source), held)
        mine = mine[np.argsort(corpus["order_key"][mine])]
        count = (
            int(np.searchsorted(np.cumsum(corpus["length_tokens"][mine]), info.tokens_plain)) + 1
        )
        plain = mine[:count]
        assert count == info.documents_plain
        assert sum(used[row] for row in plain.tolist()) == info.tokens_plain
        is_long = corpus["length_tokens"] >= BASE.long_threshold_tokens
        others = [row for row in used if corpus["source"][row] == source and row not in set(plain)]
        long_tokens = sum(used[row] for row in others if is_long[row])
        share = long_tokens / (info.tokens_kept - info.tokens_plain)
        if not mixture.short_keep_ratio:
            assert share == 1
        elif mixture.long_token_share:
            assert share == pytest.approx(0.8, abs=0.005)
        else:
            assert share > info.long_share_before + 0.2
    assert plan.warnings == []


def test_limits_leave_documents_as_they_are_unchanged(plan_of):
    """Short ones beyond what may be held out were not tokenized: another round, then the same plan."""
    corpus = make_corpus(20_000)
    mixture = dataclasses.replace(SHORT_SHARE, source_shares={"Book": 0.4, "C4": 0.6})
    is_long = corpus["length_tokens"] >= BASE.long_threshold_tokens
    keys, drops = (corpus[name] / 2**64 for name in ("order_key", "drop_key"))

    def limited(order, valid):
        kept = (keys < valid) | ((keys < order) & (is_long | (drops < 0.1)))
        return plan_of(
            corpus[kept], mixture, admission=Admission(default=Limits(order, 0.1, valid))
        )

    with pytest.raises(TooTight) as failure:
        limited(0.9, 0.05)
    wider = failure.value.wider
    assert all(limits.valid > 0.05 and limits.order >= limits.valid for limits in wider.values())
    assert places(limited(0.9, 0.3).order) == places(plan_of(corpus, mixture).order)


def test_a_corpus_too_small_for_documents_as_they_are(plan_of):
    mixture = dataclasses.replace(SHORT_SHARE, train_tokens=10_000_000, allow_repeat=100)
    with pytest.raises(DataError) as failure:
        plan_of(make_corpus(), mixture)
    corpus, plan = make_corpus(), plan_of(make_corpus(), BASE)
    told = str(failure.value)
    for index, (name, info) in enumerate(plan.sources.items()):
        tokens = corpus["length_tokens"][corpus["source"] == index].sum() - info.tokens_valid
        assert f"{name}: {tokens:,} tokens available" in told
    assert told.endswith("use a lower --train-tokens or a larger corpus")


@pytest.mark.parametrize("strategy", ["original", "cut", "global"])
def test_strategies_that_cannot_have_documents_as_they_are_beside(strategy):
    with pytest.raises(ConfigError, match="--short-share has no effect with --strategy"):
        dataclasses.replace(BASE, strategy=strategy, short_share=0.5)
    with pytest.raises(ConfigError, match=r"--short-share 1\.0 is not at least 0 and below 1"):
        dataclasses.replace(BASE, short_share=1.0)


def test_a_mixture_without_them_is_recorded_as_before():
    assert "short_share" not in BASE.to_json()
    assert BASE.to_json().keys() | {"short_share"} == dataclasses.asdict(BASE).keys()
    assert SHORT_SHARE.to_json()["short_share"] == 0.66
