"""Runs under torchrun: each rank holds a part of the vocabulary; together they give the whole's result."""

import sys

import torch
import torch.distributed as dist

from megatron_long.model.linear_cross_entropy import VocabularyShard, linear_cross_entropy

POSITIONS, HIDDEN, ROWS, VOCABULARY = 30, 8, 48, 43


LONG_POSITIONS, LONG_ROWS, LONG_VOCABULARY = 20_000, 32_256, 32_001
"""More positions than a chunk has, and a padded vocabulary: the last rank has fewer real rows."""


def check_long(group, rank) -> None:
    """All ranks cut the same chunks, so that the losses are those of each position alone."""
    hidden, weight = torch.randn(LONG_POSITIONS, 2), torch.randn(LONG_ROWS, 2)
    labels = torch.randint(0, LONG_VOCABULARY, (LONG_POSITIONS,))
    rows = LONG_ROWS // dist.get_world_size()
    shard = VocabularyShard(rank * rows, LONG_VOCABULARY)
    mine = weight[rank * rows : (rank + 1) * rows]
    with torch.no_grad():
        _, losses = linear_cross_entropy(
            hidden, mine, labels, torch.ones(LONG_POSITIONS), shard, group
        )
    some = torch.arange(0, LONG_POSITIONS, 97)
    logits = hidden[some] @ weight[:LONG_VOCABULARY].t()
    expected = torch.nn.functional.cross_entropy(logits, labels[some], reduction="none")
    torch.testing.assert_close(losses[some], expected, rtol=1e-5, atol=1e-5)


def main() -> int:
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    torch.manual_seed(0)
    hidden, weight = torch.randn(POSITIONS, HIDDEN), torch.randn(ROWS, HIDDEN)
    labels, mask = torch.randint(0, VOCABULARY, (POSITIONS,)), torch.rand(POSITIONS)

    def run(hidden, weight, first, group):
        hidden, weight = (tensor.clone().requires_grad_() for tensor in (hidden, weight))
        shard = VocabularyShard(first, VOCABULARY)
        total, losses = linear_cross_entropy(hidden, weight, labels, mask, shard, group)
        total.backward()
        return total.detach(), losses, hidden.grad, weight.grad

    rows = ROWS // dist.get_world_size()
    mine = slice(rank * rows, (rank + 1) * rows)
    total, losses, hidden_grad, weight_grad = run(hidden, weight[mine], mine.start, group)
    dist.all_reduce(hidden_grad)
    expected = run(hidden, weight, 0, None)
    for seen, value in zip(
        (total, losses, hidden_grad, weight_grad),
        (*expected[:3], expected[3][mine]),
        strict=True,
    ):
        torch.testing.assert_close(seen, value, rtol=1e-5, atol=1e-5)
    check_long(group, rank)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
