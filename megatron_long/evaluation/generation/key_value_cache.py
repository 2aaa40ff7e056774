"""Keys and values of what a sharded model has read, kept where they were computed, and attention over them.

Megatron's own inference does not take context parallelism. Here each context-parallel rank keeps the keys and
values of its zigzag shard of the prompt; a new token attends to every shard in place, and the ranks
combine their partial softmax sums, as flash-decoding does over blocks. Tensor parallelism splits heads as
always, and each pipeline stage has the cache of its layers.

Legend: b rows, s tokens of a forward pass, n prompt tokens of this rank, m tokens that may be generated, h
query heads, g key/value groups, d head size; heads are already divided by tp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp


class CacheState:
    """What the caches of all layers share.

    Args:
        group: Context-parallel group; its first rank keeps what is generated.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.is_prefill = self.is_decode = False
        self.attended = torch.empty(0, 0, dtype=torch.bool)
        """Which cached positions each row attends to [b, n], or [b, n + m] where new ones are kept."""
        self.num_prompt = 0
        self.num_known = 0
        """Positions that are filled, n at first."""

    @property
    def keeps_new(self) -> bool:
        """Whether this rank keeps what is generated."""
        return self.group.rank() == 0

    @property
    def is_active(self) -> bool:
        """Whether a generation is running."""
        return self.is_prefill or self.is_decode

    def begin(self, lengths: Tensor, positions: Tensor, most_new: int) -> None:
        """Expect prompts.

        Args:
            lengths: Real tokens of each row [b]; what follows is padding.
            positions: Place in the window of each token of this rank [n].
            most_new: Tokens that may be generated, m.
        """
        self.is_prefill, self.is_decode = True, False
        self.num_prompt = self.num_known = len(positions)
        is_real = positions[None, :] < lengths[:, None]
        new = is_real.new_ones(len(lengths), most_new if self.keeps_new else 0)
        self.attended = torch.cat([is_real, new], dim=1)

    def take_token(self) -> None:
        """Expect one more token of each row."""
        self.is_prefill, self.is_decode = False, True
        self.num_known += self.keeps_new

    def end(self) -> None:
        """Compute as without a cache."""
        self.is_prefill = self.is_decode = False


class CachedAttention(torch.nn.Module):
    """Stands in for a layer's core attention: fills the cache from a prompt, attends over it afterwards."""

    def __init__(self, attention: torch.nn.Module, state: CacheState) -> None:
        super().__init__()
        self.attention, self.state = attention, state
        self.keys = self.values = torch.empty(0)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> Tensor:
        """Attend; query [s, b, h, d], key and value [s, b, g, d], all after RoPE. Returns: [s, b, h * d]."""
        if self.state.is_decode:
            return self._decode(query, key, value)
        if self.state.is_prefill:
            self.keys, self.values = self._keep(key), self._keep(value)
        return self.attention(query, key, value, *args, **options)

    def drop(self) -> None:
        """Free the cache."""
        self.keys = self.values = torch.empty(0)

    def _keep(self, tensor: Tensor) -> Tensor:
        """[n, b, g, d] -> [b, g, n (+ m), d]."""
        num, rows, groups, size = tensor.shape
        kept = tensor.new_empty(rows, groups, self.state.attended.size(1), size)
        kept[:, :, :num] = tensor.permute(1, 2, 0, 3)
        return kept

    def _decode(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The first token attends; sequence parallelism repeats it, so that each rank has a share."""
        state, known = self.state, self.state.num_known
        if state.keeps_new:
            self.keys[:, :, known - 1], self.values[:, :, known - 1] = key[0], value[0]
        tokens, rows, heads, size = query.shape
        # Products in float32: rounded to 16 bits, scores would be off by some hundredths.
        grouped = query[0].view(rows, key.size(2), -1, size).float()
        scores = grouped @ self.keys[:, :, :known].float().transpose(-1, -2) * size**-0.5
        hidden = ~state.attended[:, None, None, :known]
        scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)  # finite: a rank may have none
        top = scores.amax(-1, keepdim=True)
        if state.group.size() > 1:
            torch.distributed.all_reduce(top, ReduceOp.MAX, group=state.group)
        weights = torch.exp(scores - top)
        sums = weights @ self.values[:, :, :known].float()
        parts = torch.cat([sums, weights.sum(-1, keepdim=True)], dim=-1)
        if state.group.size() > 1:
            torch.distributed.all_reduce(parts, group=state.group)
        output = (parts[..., :-1] / parts[..., -1:]).to(query.dtype)
        return output.reshape(1, rows, heads * size).expand(tokens, -1, -1).contiguous()
