"""Each rank saves its own part of the optimizer, and stock Megatron reads the same checkpoints."""

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_long.engine.optimizer_shards import cut_into_boxes

DISTRIBUTED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
TENSOR_PARALLEL = ("--tensor-model-parallel-size", "2", "--use-distributed-optimizer")
STOCK = "stock-optimizer-format"


@st.composite
def ranges(draw):
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    start = draw(st.integers(0, prod(shape)))
    return shape, start, draw(st.integers(start, prod(shape)))


@given(ranges())
def test_boxes_are_the_range_in_order(drawn):
    shape, start, stop = drawn
    values = np.arange(prod(shape)).reshape(shape)
    boxes = cut_into_boxes(shape, start, stop)
    found = [
        values[tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))].ravel()
        for offset, sizes in boxes
    ]
    seen = np.concatenate([np.empty(0, int), *found])
    assert seen.tolist() == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def read_state(folder) -> dict:
    """All tensors of a checkpoint by their names."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict = {}
    planner = _EmptyStateDictLoadPlanner()
    _load_state_dict(state, FileSystemReader(folder), planner=planner, no_dist=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def optimizer_bytes_by_rank(folder) -> dict[int, int]:
    """Bytes of optimizer state in the files of each rank, torch's headers included."""
    from torch.distributed.checkpoint import FileSystemReader

    found: dict[int, int] = {}
    for index, stored in FileSystemReader(folder).read_metadata().storage_data.items():
        if index.fqn.startswith("optimizer.state"):
            rank = int(stored.relative_path.split("_")[2])
            found[rank] = found.get(rank, 0) + stored.length
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "layout", "writers"),
    [
        (4, DISTRIBUTED, 4),
        (4, TENSOR_PARALLEL, 4),
        (2, ("--context-parallel-size", 2, *DISTRIBUTED), 2),
    ],
    ids=["dp4", "tp2-dp2", "cp2"],
)
def test_each_rank_writes_its_own_part(ranks, layout, writers, jobs, tmp_path):
    jobs.run(ranks, *layout, "--train-iters", 1, "--save", tmp_path)
    folder = tmp_path / "iter_0000001"
    state = read_state(folder)
    values = sum(t.numel() for name, t in state.items() if name.startswith("optimizer.state"))
    shares = optimizer_bytes_by_rank(folder)
    assert len(shares) == writers
    headers = 60 * 2000  # torch.save writes some 1,100 bytes around each of a rank's boxes
    assert 4 * values <= sum(shares.values()) < 4 * values + headers * writers
    # Normalization weights, kept by both tensor-parallel ranks, are saved by one: 4 x 64 of 131,000 values.
    assert max(shares.values()) < 1.02 * 4 * values / writers + headers


@pytest.mark.slow
def test_stock_megatron_and_ours_read_each_other(jobs, read_log, tmp_path):
    common = ("--train-iters", 8, "--save-interval", 4)
    stock = [{"kind": STOCK, "ranks": [0, 1, 2, 3]}]
    jobs.run(
        2, *common, *DISTRIBUTED, "--save", tmp_path / "ours", "--loss-log", tmp_path / "ours.jsonl"
    )
    jobs.run(2, *common, *DISTRIBUTED, "--save", tmp_path / "stock", faults=stock)
    states = [read_state(tmp_path / kind / "iter_0000004") for kind in ("ours", "stock")]
    assert set(states[0]) == set(states[1])
    assert any(name.startswith("optimizer.state.exp_avg_sq.decoder") for name in states[0])
    assert [name for name in states[0] if not states[0][name].equal(states[1][name])] == []
    expected = read_log(tmp_path / "ours.jsonl")[4:]
    for kind, faults in (("ours", stock), ("stock", [])):
        log = tmp_path / f"{kind}-next.jsonl"
        start = ("--load", tmp_path / kind, "--ckpt-step", 4, "--loss-log", log)
        jobs.run(2, *common, *DISTRIBUTED, *start, faults=faults)
        assert read_log(log) == expected
        log = tmp_path / f"{kind}-other-layout.jsonl"
        start = ("--load", tmp_path / kind, "--ckpt-step", 4, "--loss-log", log)
        jobs.run(4, *common, *TENSOR_PARALLEL, *start, faults=faults)
        seen = [step["lm loss"] for step in read_log(log)]
        assert seen == pytest.approx([step["lm loss"] for step in expected], abs=2e-6)
