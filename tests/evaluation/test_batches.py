import numpy as np
import pytest

from megatron_long.evaluation.batches import Row, pad_length, plan_batches, score_rows
from megatron_long.evaluation.work import count_work, forward_flops
from megatron_long.flags.recipe import LLAMA3_8B

from .fakes import FakeScorer, copy_predictions


@pytest.mark.parametrize("step", [1, 4, 128])
def test_every_row_is_in_one_batch_that_holds_it(step):
    lengths = np.random.default_rng(0).integers(2, 4096, 300).tolist()
    batches = plan_batches(lengths, tokens_per_batch=8192, longest=4096, step=step)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(300))
    for batch in batches:
        assert max(lengths[row] for row in batch.rows) <= batch.padded_length <= 4096
        assert batch.padded_length % step == 0
        assert len(batch.rows) * batch.padded_length <= 8192
    tokens = [len(batch.rows) * batch.padded_length for batch in batches]
    assert sum(tokens) < 1.12 * sum(lengths)
    assert [batch.padded_length for batch in batches] == sorted(
        (batch.padded_length for batch in batches), reverse=True
    )


def test_padding_stays_below_three_percent_and_shapes_are_few():
    lengths = np.arange(1024, 131_073)
    padded = np.array([pad_length(int(n), longest=131_072, step=1) for n in lengths])
    assert (padded >= lengths).all()
    assert (padded / lengths).max() < 1.032
    assert len(set(padded.tolist())) <= 32 * 7 + 1


def test_the_paper_s_grid_costs_what_its_tokens_cost():
    """40 lengths by 10 depths: not 400 full passes, and the cells below 64K share theirs."""
    lengths = np.linspace(1024, 131_072, 40).round().astype(int).repeat(10).tolist()
    batches = plan_batches(lengths, tokens_per_batch=131_072, longest=131_072, step=128)
    work = count_work(LLAMA3_8B, batches, lengths, 20)
    assert work.num_batches <= 260
    assert work.num_tokens < 1.02 * sum(lengths)
    full = 400 * forward_flops(LLAMA3_8B, 131_072, 20)
    assert 0.39 < work.flops / full < 0.43
    assert 0.98e18 < work.flops < 1.02e18


def test_replicas_share_the_rounds_and_may_be_stopped():
    rows = [Row(np.arange(1, n), np.arange(2, n + 1)) for n in range(2, 12)]
    lengths = [len(row.tokens) for row in rows]
    seen: list[int] = []
    for rank in range(3):
        scorer = FakeScorer(copy_predictions, 16, rank=rank, size=3)
        rounds = list(score_rows(scorer, lengths, rows.__getitem__, tokens_per_batch=16))
        assert len(rounds) == 2
        seen += [index for part in rounds for index in part]
    assert sorted(seen) == list(range(10))
    scorer = FakeScorer(copy_predictions, 16)
    answers = iter([True, True, False])
    stopped = list(
        score_rows(
            scorer, lengths, rows.__getitem__, tokens_per_batch=16, may_go_on=answers.__next__
        )
    )
    assert len(stopped) == len(scorer.shapes) == 2
