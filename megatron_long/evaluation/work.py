"""How much arithmetic an evaluation is, so that its time can be planned before a GPU is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_long.evaluation.batches import Batch

if TYPE_CHECKING:
    from megatron_long.model.geometry import LlamaGeometry


@dataclass(frozen=True)
class Work:
    """What a list of batches amounts to."""

    num_batches: int
    num_tokens: int
    """With padding."""
    num_row_tokens: int
    """Without padding."""
    flops: float

    def __str__(self) -> str:
        millions = self.num_tokens / 1e6
        tokens = f"{millions:,.1f}M" if millions >= 0.1 else f"{self.num_tokens:,}"
        padding = self.num_tokens / self.num_row_tokens - 1
        return (
            f"{self.num_batches} forward passes over {tokens} tokens "
            f"({padding:.1%} of them padding), {self.flops:.3g} FLOPs"
        )


def forward_flops(model: LlamaGeometry, length: int, num_scored: int) -> float:
    """FLOPs of one causal forward pass over a row; a multiplication and an addition count as two.

    Args:
        length: Tokens of the row, n.
        num_scored: Positions that the output layer is applied to.

    >>> from megatron_long.flags.recipe import LLAMA3_8B
    >>> f"{forward_flops(LLAMA3_8B, 131072, 0):.3g}"
    '6.33e+15'
    """
    heads = model.num_attention_heads * model.kv_channels
    groups = model.num_query_groups * model.kv_channels
    weights = model.hidden_size * (2 * heads + 2 * groups + 3 * model.ffn_hidden_size)
    attention = 2 * heads * length  # scores and values, half of the square by causality
    per_token = model.num_layers * (2 * weights + attention)
    return per_token * length + 2.0 * model.hidden_size * model.vocab_size * num_scored


def count_work(
    model: LlamaGeometry, batches: Sequence[Batch], lengths: Sequence[int], num_scored: int
) -> Work:
    """Add up batches, padding included.

    Args:
        lengths: Tokens of each row without padding.
        num_scored: Positions of each row that have a label.
    """
    return Work(
        num_batches=len(batches),
        num_tokens=sum(len(batch.rows) * batch.padded_length for batch in batches),
        num_row_tokens=sum(lengths),
        flops=sum(
            len(batch.rows) * forward_flops(model, batch.padded_length, num_scored)
            for batch in batches
        ),
    )
