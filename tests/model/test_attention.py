"""The portable attention: chunk arithmetic, and the module against a dense reference."""

from pathlib import Path

import pytest
import torch

from megatron_long.model.attention import query_segments, zigzag_shard, zigzag_unshard

WORKER = Path(__file__).with_name("attention_worker.py")


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_come_back_in_order(cp, dim):
    whole = torch.arange(2 * 24 * 24).view(24, 24, 2)
    shards = [zigzag_shard(whole, rank, cp, dim=dim) for rank in range(cp)]
    assert all(shard.size(dim) == 24 // cp for shard in shards)
    assert torch.equal(zigzag_unshard(shards, dim=dim), whole)


@pytest.mark.parametrize("documents", [[0, 32], [0, 1, 2, 32], [0, 7, 8, 30, 32]])
@pytest.mark.parametrize(("start", "stop"), [(0, 8), (8, 16), (24, 32)])
def test_segments_cover_rows_within_documents(start, stop, documents):
    segments = query_segments(start, stop, documents)
    rows = [row for first, last, _ in segments for row in range(first, last)]
    assert rows == list(range(start, stop))
    for first, last, key_start in segments:
        own = max(d for d in documents if d <= first)
        assert key_start == own
        assert not any(first < d < last for d in documents)


@pytest.mark.slow
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_against_dense_float64_and_megatrons_shards(cp, run_job):
    if cp == 1:
        command = ["-m", "torch.distributed.run", "--standalone", WORKER, "single"]
        run_job(1, command)
    else:
        run_job(cp, [WORKER])
