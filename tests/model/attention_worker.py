"""Runs under torchrun: context-parallel attention against a dense float64 reference."""

import sys

import torch
import torch.distributed as dist

from megatron_long.engine import host_backend

host_backend.install()

# ruff: noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_long.model import attention
from megatron_long.model.attention import ContextParallelAttention, zigzag_shard

TOLERANCE = 1e-12
BATCH, HEADS, GROUPS, HEAD_SIZE = 2, 4, 2, 8


def dense_reference(query, key, value, grad, documents):
    """Output and gradients of masked attention over the whole window."""
    tokens = torch.arange(query.size(0))
    document = torch.bucketize(tokens, torch.tensor(documents[1:]), right=True)
    allowed = (tokens[:, None] >= tokens) & (document[:, None] == document)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    q, k, v = leaves
    k, v = (tensor.repeat_interleave(HEADS // GROUPS, 2) for tensor in (k, v))
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k) / HEAD_SIZE**0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    output = torch.einsum("bhqk,kbhd->qbhd", weights, v).reshape(grad.shape)
    output.backward(grad)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def sharded(query, key, value, grad, documents, group):
    """The same of this rank's shard, through the module under test."""
    module = ContextParallelAttention.__new__(ContextParallelAttention)
    torch.nn.Module.__init__(module)
    module.cp_group, module.softmax_scale, module.dropout = group, HEAD_SIZE**-0.5, 0.0
    cp, rank = group.size(), group.rank()
    leaves = [zigzag_shard(t, rank, cp).detach().requires_grad_() for t in (query, key, value)]
    packed = None
    if len(documents) > 2:
        offsets = torch.tensor(documents)
        packed = PackedSeqParams(qkv_format="sbhd", cu_seqlens_q=offsets, cu_seqlens_kv=offsets)
    output = module(*leaves, None, packed_seq_params=packed)
    output.backward(zigzag_shard(grad, rank, cp))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def largest_error(batch: int, documents: list[int], group) -> float:
    """Largest difference of output and gradients on this rank."""
    torch.manual_seed(0)
    length = documents[-1]
    query, key, value = (
        torch.randn(length, batch, heads, HEAD_SIZE, dtype=torch.float64)
        for heads in (HEADS, GROUPS, GROUPS)
    )
    grad = torch.randn(length, batch, HEADS * HEAD_SIZE, dtype=torch.float64)
    cp, rank = group.size(), group.rank()
    expected = dense_reference(query, key, value, grad, documents)
    seen = sharded(query, key, value, grad, documents, group)
    return max(
        (zigzag_shard(e, rank, cp) - s).abs().max().item()
        for e, s in zip(expected, seen, strict=True)
    )


def main() -> int:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    length = 32 * group.size()
    cases = [
        (BATCH, [0, length]),
        (1, [0, 3, 4, 11, length - 9, length]),
        (1, [0, 1, 2, length // 2, length]),
        (1, [0, *range(5, length, 7), length]),
    ]
    errors = [largest_error(batch, documents, group) for batch, documents in cases]
    tokens = torch.arange(2 * length).view(2, length)
    theirs = get_batch_on_this_cp_rank({"tokens": tokens}, is_hybrid_cp=False, cp_group=group)
    assert torch.equal(theirs["tokens"], zigzag_shard(tokens, group.rank(), group.size(), dim=1))
    # Without the sum over ranks, gradients of keys and values must be wrong: the check can fail.
    gather = attention._GatherSequence
    gather.backward = staticmethod(
        lambda ctx, g: (zigzag_shard(g, group.rank(), group.size()).contiguous(), None)
    )
    broken = largest_error(BATCH, [0, length], group)
    print(f"cp={group.size()} rank={group.rank()} errors {errors} broken {broken}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    broken_is_seen = broken > 0.1 or len(sys.argv) > 1  # one process has nothing to sum
    return int(max(errors) > TOLERANCE or not broken_is_seen)


if __name__ == "__main__":
    sys.exit(main())
