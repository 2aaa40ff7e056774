"""Core attention under context parallelism in plain PyTorch, with document masks.

It replaces Megatron's `DotProductAttention` if Transformer Engine is not installed, and is the
reference for Transformer Engine otherwise. Legend: b batch, s sequence of the whole window, h query heads,
g key/value groups, d head size; sizes of this rank carry `/cp` (and heads are already divided by tp).

Rank r of cp holds chunks r and 2*cp-1-r of the 2*cp equal chunks of a window ("zigzag", as
in `megatron.core.utils.get_batch_on_this_cp_rank`), so that causal work is balanced.
Keys and values are gathered from all ranks in sequence order; each of the two local query
chunks then attends to the prefix that ends where the chunk ends.
"""

import itertools
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_long.errors import ConfigError


def zigzag_chunks(rank: int, cp: int) -> tuple[int, int]:
    """The two of 2*cp chunks that a context-parallel rank holds.

    >>> [zigzag_chunks(rank, 2) for rank in range(2)]
    [(0, 3), (1, 2)]
    """
    return rank, 2 * cp - 1 - rank


def zigzag_shard(tensor: Tensor, rank: int, cp: int, dim: int = 0) -> Tensor:
    """The part of a whole-window tensor that a context-parallel rank holds.

    Args:
        tensor: Any tensor whose size along `dim` is a multiple of 2*cp.
    Returns: The rank's two chunks, one after the other; `tensor` itself when cp is 1.
    """
    if cp == 1:
        return tensor
    chunks = tensor.chunk(2 * cp, dim=dim)
    return torch.cat([chunks[i] for i in zigzag_chunks(rank, cp)], dim=dim)


def zigzag_unshard(shards: list[Tensor], dim: int = 0) -> Tensor:
    """Put the shards of all context-parallel ranks, in rank order, back in sequence order.

    >>> whole = torch.arange(8)
    >>> zigzag_unshard([zigzag_shard(whole, rank, 2) for rank in range(2)]).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    cp = len(shards)
    if cp == 1:
        return shards[0]
    ordered: list[Tensor] = [shards[0]] * (2 * cp)
    for rank, shard in enumerate(shards):
        for position, chunk in zip(zigzag_chunks(rank, cp), shard.chunk(2, dim=dim), strict=True):
            ordered[position] = chunk
    return torch.cat(ordered, dim=dim)


class _GatherSequence(torch.autograd.Function):
    """[s/cp, ...] shard -> [s, ...] in sequence order; backward sums over ranks into the shard."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = shard.new_empty(group.size() * shard.size(0), *shard.shape[1:])
        dist.all_gather_into_tensor(gathered, shard.contiguous(), group=group)
        return zigzag_unshard(list(gathered.chunk(group.size())))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        cp = ctx.group.size()
        by_rank = torch.cat([zigzag_shard(grad, rank, cp) for rank in range(cp)])
        shard_grad = grad.new_empty(grad.size(0) // cp, *grad.shape[1:])
        dist.reduce_scatter_tensor(shard_grad, by_rank, group=ctx.group)
        return shard_grad, None


def query_segments(start: int, stop: int, documents: list[int]) -> list[tuple[int, int, int]]:
    """Cut the query rows [start, stop) of a window where documents begin.

    A row attends from the start of its own document to itself, so a segment of rows is one
    causal attention, aligned to the bottom right, of `first:last` rows over `key_start:last` keys.

    Args:
        documents: Offsets of document starts in the window, ascending from 0, then its length.
    Returns: (first, last, key_start) of each segment, in window offsets.

    >>> query_segments(4, 8, [0, 3, 6, 12])
    [(4, 6, 3), (6, 8, 6)]
    """
    cuts = [start, *(d for d in documents if start < d < stop), stop]
    return [
        (first, last, max(d for d in documents if d <= first))
        for first, last in itertools.pairwise(cuts)
    ]


class ContextParallelAttention(MegatronModule):
    """Causal attention of a context-parallel shard over the whole window, or over each document of it.

    Document masks of arbitrary lengths come as
    `PackedSeqParams(qkv_format="sbhd", cu_seqlens_q=offsets of the whole window)`, for a
    micro-batch of one; nothing needs padding.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.cp_group = groups.cp
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.dropout = float(dropout)
        if config.softmax_type != "vanilla" or config.apply_query_key_layer_scaling:
            raise ConfigError(
                "the portable attention supports only the plain softmax; drop --softmax-type and "
                "--apply-query-key-layer-scaling, or train with Transformer Engine"
            )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s/cp, b, h, d], zigzag shard.
            key: [s/cp, b, g, d]. value: [s/cp, b, g, d].
            attention_mask: Must be None: the mask is causal, within documents.
            packed_seq_params: Document boundaries of the whole window, see the class.
        Returns: [s/cp, b, h * d].
        """
        assert attention_mask is None
        assert attention_bias is None
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        rows, batch = query.shape[:2]
        documents = [0, rows * cp]
        if packed_seq_params is not None:
            assert packed_seq_params.qkv_format == "sbhd"
            assert batch == 1
            documents = packed_seq_params.cu_seqlens_q.tolist()
        if cp == 1:
            return self._attend_rows(query, key, value, 0, documents).reshape(rows, batch, -1)
        gathered = _GatherSequence.apply(torch.cat([key, value], dim=-1), self.cp_group)
        key, value = gathered.split(key.size(-1), dim=-1)
        chunk_rows = rows // 2
        outputs = [
            self._attend_rows(chunk, key, value, position * chunk_rows, documents)
            for chunk, position in zip(query.chunk(2), zigzag_chunks(rank, cp), strict=True)
        ]
        return torch.cat(outputs).reshape(rows, batch, -1)

    def _attend_rows(
        self, query: Tensor, key: Tensor, value: Tensor, start: int, documents: list[int]
    ) -> Tensor:
        """Query rows [r, b, h, d] that begin at `start` of the window, over keys [s, b, g, d]."""
        outputs = []
        for first, last, key_start in query_segments(start, start + query.size(0), documents):
            outputs.append(
                self._attend(
                    query[first - start : last - start], key[key_start:last], value[key_start:last]
                )
            )
        return torch.cat(outputs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention aligned to the bottom right: query [r, b, h, d], key and value [t, b, g, d]."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [b, h, r, d]
        grouped = k.size(1) != q.size(1)
        if grouped and q.is_cuda:  # the flash kernels behind this bias take equal head counts only
            k, v = (tensor.repeat_interleave(q.size(1) // k.size(1), 1) for tensor in (k, v))
            grouped = False
        output = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=causal_lower_right(q.size(2), k.size(2)),
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=grouped,
        )
        return output.permute(2, 0, 1, 3)
