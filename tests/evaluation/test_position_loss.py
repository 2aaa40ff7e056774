import math
from itertools import chain, pairwise

import numpy as np
import pytest

from megatron_long.errors import ConfigError, DataError
from megatron_long.evaluation.loss.held_out import HeldOutDocument, select_documents
from megatron_long.evaluation.loss.position_loss import (
    PositionLoss,
    cell_edges,
    default_buckets,
    loss_by_position,
    parse_buckets,
)

from .fakes import CORRECT_LOSS, WRONG_LOSS, FakeScorer, copy_predictions

LENGTH = 64
BUCKETS = ((0, 8), (8, 64), (5, 33))


class Documents:
    """What is used of an indexed dataset reader."""

    def __init__(self, documents: list[np.ndarray]) -> None:
        self.documents = documents
        self.lengths = np.array([len(document) for document in documents], dtype=np.int32)

    def read(self, index: int) -> np.ndarray:
        return self.documents[index]


@pytest.fixture
def readers() -> dict[str, Documents]:
    rng = np.random.default_rng(1)
    lengths = {"Book": [200, 65, 64], "C4": [2, 10, 30, 7, 1], "GitHub": [66]}
    return {
        source: Documents([rng.integers(12, size=n).astype(np.uint16) for n in part])
        for source, part in lengths.items()
    }


def token_losses(readers, source):
    """Give (position, loss) of every token of a source, one by one."""
    for document in readers[source].documents:
        tokens = document[: LENGTH + 1].astype(int)
        predicted = copy_predictions(tokens[:-1])
        for position in range(len(tokens) - 1):
            is_right = predicted[position] == tokens[position + 1]
            yield position, CORRECT_LOSS if is_right else WRONG_LOSS


def assert_same(left: PositionLoss, right: PositionLoss) -> None:
    assert left.edges == right.edges
    assert left.num_documents == right.num_documents
    for source in left.loss_sums:
        np.testing.assert_allclose(left.loss_sums[source], right.loss_sums[source], rtol=1e-12)
        assert left.token_counts[source].tolist() == right.token_counts[source].tolist()


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_bucket_means_equal_a_count_token_by_token(readers, micro_batch_size):
    scorer = FakeScorer(copy_predictions, LENGTH)
    loss = loss_by_position(
        scorer, select_documents(readers), BUCKETS, micro_batch_size=micro_batch_size
    )
    everything = {source: list(token_losses(readers, source)) for source in readers}
    groups = [*everything.items(), (None, list(chain.from_iterable(everything.values())))]
    for source, losses in groups:
        for start, stop in [*BUCKETS, (0, LENGTH)]:
            inside = [value for position, value in losses if start <= position < stop]
            assert loss.num_tokens(start, stop, source) == len(inside)
            assert loss.mean(start, stop, source) == pytest.approx(np.mean(inside), rel=1e-6)
    assert 0 < np.nanmin(loss.curve()) < np.nanmax(loss.curve()) <= WRONG_LOSS
    assert loss.num_documents == {"Book": 3, "C4": 4, "GitHub": 1}


def test_the_boundary_belongs_to_the_later_bucket():
    loss = PositionLoss(cell_edges(16, [(0, 9)]))
    losses = np.zeros(16)
    losses[9] = 1.0
    loss.add("Book", losses, np.ones(16))
    assert (loss.mean(0, 9), loss.mean(9, 10), loss.mean(10, 16)) == (0.0, 1.0, 0.0)


def test_positions_not_scored_do_not_count():
    loss = PositionLoss((0, 2, 4))
    loss.add("Book", np.array([1.0, 99.0, 3.0]), np.array([7, -1, 7]))
    assert (loss.mean(0, 2), loss.mean(2, 4), loss.num_tokens(0, 4)) == (1.0, 3.0, 2)
    assert math.isnan(PositionLoss((0, 2, 4)).mean(0, 4))


def test_sums_do_not_lose_small_losses():
    loss = PositionLoss((0, 1))
    for _ in range(10_000):
        loss.add("Book", np.array([0.1], dtype=np.float32), np.array([1]))
    assert loss.mean(0, 1) == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_sources_are_weighted_by_tokens():
    loss = PositionLoss((0, 4))
    loss.add("Book", np.full(4, 1.0), np.ones(4))
    loss.add("C4", np.full(1, 6.0), np.ones(1))
    assert loss.mean(0, 4) == 2.0


@pytest.mark.parametrize("size", [1, 2, 3, 11])
def test_replicas_add_up_to_one(readers, size):
    """Eleven replicas are more than there are documents: some score nothing."""
    documents = select_documents(readers)
    alone = loss_by_position(FakeScorer(copy_predictions, LENGTH), documents, BUCKETS)
    peers: list[FakeScorer] = []
    for rank in range(size):
        scorer = FakeScorer(copy_predictions, LENGTH, rank=rank, size=size, peers=tuple(peers))
        total = loss_by_position(scorer, documents, BUCKETS)
        peers.append(scorer)
    assert_same(total, alone)


def test_documents_are_cut_not_dropped(readers):
    rows = [document.row(LENGTH) for document in select_documents(readers)]
    assert [len(row.tokens) for row in rows] == [64, 64, 63, 1, 9, 29, 6, 64]
    first = readers["Book"].documents[0]
    assert rows[0].tokens.tolist() == first[:64].tolist()
    assert rows[0].labels.tolist() == first[1:65].tolist()


def test_selection(readers):
    def chosen(**settings):
        return [(d.source, d.index) for d in select_documents(readers, **settings)]

    assert chosen(min_document_tokens=65) == [("Book", 0), ("Book", 1), ("GitHub", 0)]
    assert chosen(max_documents_per_source=1) == [("Book", 0), ("C4", 0), ("GitHub", 0)]
    assert chosen(min_document_tokens=10, max_documents_per_source=2) == [
        ("Book", 0), ("Book", 1), ("C4", 1), ("C4", 2), ("GitHub", 0),
    ]  # fmt: skip
    with pytest.raises(DataError, match="longest has 200 tokens"):
        chosen(min_document_tokens=201)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 1000, 2048, 81920, 131072])
def test_edges_cover_the_context_and_hold_the_buckets(length):
    edges = cell_edges(length, default_buckets(length) if length > 1 else ())
    assert edges[0] == 0
    assert edges[-1] == length
    assert all(before < after for before, after in pairwise(edges))
    if length > 1:
        assert {edge for bucket in default_buckets(length) for edge in bucket} <= set(edges)
    assert len(edges) <= 4 * math.log2(length) + 5


@pytest.mark.parametrize("text", ["0-", "a-b", "0-5-9", "0", "", "0-4,", "-5-4"])
def test_bucket_syntax(text):
    with pytest.raises(ConfigError, match="not a list of intervals"):
        parse_buckets(text, 64)


@pytest.mark.parametrize("text", ["0-65", "8-8", "9-8"])
def test_buckets_beyond_the_context(text):
    with pytest.raises(ConfigError, match=f"--buckets {text} .*--context-length 64"):
        parse_buckets(text, 64)


def test_a_loss_that_is_not_finite_names_the_source(readers):
    class Broken(FakeScorer):
        def score(self, tokens, labels):
            scores = super().score(tokens, labels)
            scores.losses[:, 3] = math.inf
            return scores

    documents = [HeldOutDocument("Book", readers["Book"], 0)]
    with pytest.raises(DataError, match="Book is not finite"):
        loss_by_position(Broken(copy_predictions, LENGTH), documents, BUCKETS)
