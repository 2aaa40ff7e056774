"""Runs as a program: megatron_long.pretrain that also writes its gradients, and can rehearse `thd`.

    document_worker.py GRADIENTS.pt sbhd|thd [flags of megatron_long.pretrain]

`thd` trains in the layout of Transformer Engine's packed kernels, documents padded and dealt out one by
one, with a dense attention of plain PyTorch in their place: what they compute, without a GPU.
"""

import sys
from typing import Any

from megatron_long.engine import host_backend

host_backend.install()

# ruff: noqa: E402
import torch
import torch.distributed as dist

from megatron_long import pretrain
from megatron_long.cli import run_tool
from megatron_long.model.attention import ContextParallelAttention
from megatron_long.model.document_masks import PaddedDocuments
from megatron_long.training import batch
from megatron_long.training.callbacks.step_logs import LossLog


class GatherRanks(torch.autograd.Function):
    """[t/cp, ...] of each rank -> [cp, t/cp, ...]; backward sums over ranks."""

    @staticmethod
    def forward(ctx: Any, shard: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        gathered = shard.new_empty(group.size() * shard.size(0), *shard.shape[1:])
        dist.all_gather_into_tensor(gathered, shard.contiguous(), group=group)
        return gathered.unflatten(0, (group.size(), -1))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None


def packed_attention(self, query, key, value, attention_mask, **arguments) -> torch.Tensor:
    """Documents of [t/cp, h, d] shards by a dense float mask; padding belongs to its document."""
    packed = arguments["packed_seq_params"]
    assert packed.qkv_format == "thd"
    assert packed.cu_seqlens_q is packed.cu_seqlens_q_padded
    offsets = packed.cu_seqlens_q.long()
    assert int(offsets.diff().max()) <= packed.max_seqlen_q
    cp, own = self.cp_group.size(), self.cp_group.rank()
    layout = PaddedDocuments(
        offsets, offsets
    )  # positions in the buffer, which has no padding of its own
    rows = torch.stack([layout.shard_rows(rank, cp) for rank in range(cp)])
    assert rows.flatten().sort().values.equal(torch.arange(int(offsets[-1])))
    repeats = query.size(1) // key.size(1)
    key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    keys, values = (GatherRanks.apply(t, self.cp_group).flatten(0, 1) for t in (key, value))
    positions = rows.flatten()
    document = torch.bucketize(positions, offsets[1:], right=True)
    mine, my_document = rows[own], document.view(cp, -1)[own]
    allowed = (my_document[:, None] == document) & (mine[:, None] >= positions)
    scores = torch.einsum("qhd,khd->hqk", query, keys) * self.softmax_scale
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).flatten(1)


def main() -> int:
    path, attention, *argv = sys.argv[1:]
    models: list[torch.nn.Module] = []
    stock_step, stock_log = batch.forward_step, LossLog.on_log

    def forward_step(settings, iterator, model):
        models.append(model)
        return stock_step(settings, iterator, model)

    def log(self, log):
        if dist.get_rank() == 0 and log.iteration == 1:
            gradients = {name: p.main_grad.clone() for name, p in models[0].named_parameters()}
            torch.save(gradients, path)
        stock_log(self, log)

    batch.forward_step, LossLog.on_log = forward_step, log
    if attention == "thd":
        batch.attention_format = lambda args: "thd"
        ContextParallelAttention.forward = packed_attention
    return pretrain.main(argv)


if __name__ == "__main__":
    sys.exit(run_tool(main))
