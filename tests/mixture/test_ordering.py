import numpy as np
import pytest

from megatron_long.mixture import external_sort
from megatron_long.mixture.external_sort import iterate_rows, sort_on_disk
from megatron_long.mixture.ordering import measure_evenness, order_documents
from megatron_long.mixture.selection import CHOSEN_DTYPE


def make_chosen(num_documents=30_000, seed=0):
    """Four sources with shares of tokens from a hundredth to a half, of quite different lengths."""
    generator = np.random.default_rng(seed)
    chosen = np.zeros(num_documents, CHOSEN_DTYPE)
    chosen["source"] = generator.choice(4, num_documents, p=[0.005, 0.2, 0.3, 0.495])
    scale = np.array([30_000, 300, 2000, 600])[chosen["source"]]
    chosen["length_tokens"] = 2 + generator.exponential(scale)
    chosen["key"] = generator.integers(0, 2**64, num_documents, dtype=np.uint64)
    chosen["line"] = np.arange(num_documents)
    return chosen


def tokens_of(chosen):
    return np.bincount(chosen["source"], chosen["length_tokens"].astype(float), 4).tolist()


def test_windows_are_more_even_than_after_plain_shuffling(tmp_path):
    chosen = make_chosen()
    ours = order_documents(chosen, 4, 1, tmp_path)
    assert sorted(ours["line"]) == list(range(len(chosen)))
    tokens = tokens_of(chosen)
    for window, factor in ((200_000, 1.0), (1_000_000, 2.0), (4_000_000, 3.0)):
        even = measure_evenness(iterate_rows(ours), tokens, window)
        shuffled = measure_evenness([chosen[np.argsort(chosen["key"])]], tokens, window)
        assert even.num_windows == shuffled.num_windows == int(sum(tokens) // window)
        assert even.mean_deviation < shuffled.mean_deviation / factor
        assert even.largest_deviation < shuffled.largest_deviation / factor
        # Documents stay whole, so one of the longest may fall on either side of a window's edge.
        assert even.largest_deviation < 2 * chosen["length_tokens"].max() / window


def test_order_within_a_source_is_that_of_the_keys_pass_by_pass(tmp_path):
    chosen = np.concatenate([make_chosen(2000), make_chosen(2000, seed=1)])
    chosen["repeat"] = np.repeat([0, 1], 2000)
    ours = order_documents(chosen, 4, 2, tmp_path)
    for source in range(4):
        mine = ours[ours["source"] == source]
        assert (np.lexsort((mine["key"], mine["repeat"])) == np.arange(len(mine))).all()


def test_measure_against_a_count_of_every_token():
    chosen = make_chosen(300)
    tokens = tokens_of(chosen)
    each = np.repeat(chosen["source"], chosen["length_tokens"])
    window = 7000
    whole = each[: len(each) // window * window].reshape(-1, window)
    shares = np.stack([(whole == source).mean(axis=1) for source in range(4)])
    deviation = np.abs(shares - np.array(tokens)[:, None] / sum(tokens))
    chunks = [chosen[start : start + 13] for start in range(0, 300, 13)]
    got = measure_evenness(chunks, tokens, window)
    assert got.num_windows == len(whole)
    assert got.mean_deviation == pytest.approx(deviation.mean())
    assert got.largest_deviation == pytest.approx(deviation.max())


def test_files_smaller_than_a_window_have_no_measure():
    assert measure_evenness([make_chosen(10)], tokens_of(make_chosen(10)), 10**9).num_windows == 0


@pytest.mark.parametrize("chunk_rows", [7, 1000])
def test_sort_on_disk(tmp_path, monkeypatch, chunk_rows):
    monkeypatch.setattr(external_sort, "CHUNK_ROWS", chunk_rows)
    generator = np.random.default_rng(0)
    rows = np.zeros(3000, [("group", "<u2"), ("key", "<u8"), ("number", "<u4")])
    rows["group"] = generator.choice(5, 3000, p=[0.5, 0.1, 0.1, 0.3, 0])
    # Many equal keys, and many in one bucket.
    rows["key"] = generator.choice(np.array([3, 5, 2**63, 2**64 - 1], np.uint64), 3000)
    rows["number"] = np.arange(3000)
    found, bounds = sort_on_disk(
        lambda: np.array_split(rows, 11),
        tmp_path / "sorted",
        rows.dtype,
        5,
        lambda chunk: (chunk["group"], chunk["key"]),
    )
    np.testing.assert_array_equal(found, rows[np.lexsort((rows["key"], rows["group"]))])
    assert bounds.tolist() == [0, *np.cumsum(np.bincount(rows["group"], minlength=5)).tolist()]


def test_sorting_nothing(tmp_path):
    rows = np.zeros(0, [("key", "<u8")])
    found, bounds = sort_on_disk(
        lambda: [rows], tmp_path / "x", rows.dtype, 3, lambda c: (np.zeros(0, np.int64), c["key"])
    )
    assert len(found) == 0
    assert bounds.tolist() == [0, 0, 0, 0]
