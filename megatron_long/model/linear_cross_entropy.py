"""Fused output layer and cross entropy, without the full logits.

At 131,072 tokens the float32 logits of a 128K vocabulary take 64 GiB. Here the output layer is applied to
a chunk of positions at a time; each chunk yields its loss and, if gradients are needed, those of
the hidden states and of the output weight at once, so that no logits are kept or computed twice.

Legend: n positions of this rank (s/cp * b), c of them a chunk, h hidden, v padded vocabulary, cut over
tensor parallelism into v/tp rows a rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_long.model.labels import UNSCORED

CHUNK_LOGITS = 2**28
"""Logits that exist at a time: 1 GiB in float32."""


@dataclass(frozen=True)
class VocabularyShard:
    """The rows of the output layer that a tensor-parallel rank holds."""

    first: int
    """Token id of the first row."""
    vocab_size: int
    """Real tokens of the whole vocabulary; rows beyond are padding and get no probability."""

    def num_real_rows(self, num_rows: int) -> int:
        """Rows of `num_rows` here that stand for real tokens.

        >>> VocabularyShard(64, 100).num_real_rows(64)
        36
        """
        return min(max(self.vocab_size - self.first, 0), num_rows)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    shard: VocabularyShard,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Masked sum of the token losses, and each of them.

    The gradient flows through the sum alone: that is what lets it be made chunk by chunk in the forward
    pass. The weight's goes in float32 to `weight.main_grad` where Megatron's gradient buffer gave it one.

    Args:
        hidden: Hidden states [n, h] of whole positions (gathered under sequence parallelism).
        weight: Rows of the output layer [v/tp, h], the dtype of `hidden`.
        labels: Token ids [n], int64; `UNSCORED` allowed.
        loss_mask: Weight of each position in the sum [n], float32.
        group: Tensor-parallel group; None is one rank.
    Returns: Sum (scalar, float32, nats), and the losses [n], float32, nats, without gradient. The hidden
        states' gradient is this rank's share: to be summed over the group.
    """
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(
        hidden, weight, labels, loss_mask, shard, group, wants_gradient
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        shard: VocabularyShard,
        group: ProcessGroup | None,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        num_rows = shard.num_real_rows(weight.size(0))
        rows, local = weight[:num_rows], labels - shard.first
        losses = torch.empty(labels.numel(), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.zeros_like(hidden) if wants_gradient else None
        weight_grad = (
            weight.new_zeros(weight.shape, dtype=torch.float32) if wants_gradient else None
        )
        for part in chunks(labels.numel(), weight.size(0)):
            logits = multiply(hidden[part], rows.t())
            statistics = gather_statistics(chunk_statistics(logits, local[part]), group)
            log_sum_exp, losses[part] = combine(statistics, labels[part])
            if hidden_grad is None or weight_grad is None:
                continue
            scale = loss_mask[part].masked_fill(labels[part] == UNSCORED, 0.0)
            grad = logit_gradient(logits, log_sum_exp, local[part], scale, hidden.dtype)
            torch.mm(grad, rows, out=hidden_grad[part])
            accumulate(weight_grad[:num_rows], grad.t(), hidden[part])
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight = weight
        ctx.mark_non_differentiable(losses)
        # A masked position may have a label outside the vocabulary, whose loss is infinite.
        return torch.sum(losses.masked_fill(loss_mask == 0, 0.0) * loss_mask), losses

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple:
        hidden_grad, weight_grad = ctx.saved_tensors
        weight_grad = deliver_weight_gradient(ctx.weight, weight_grad.mul_(grad_sum))
        return hidden_grad.mul_(grad_sum), weight_grad, None, None, None, None, None


def chunks(num_positions: int, num_rows: int) -> list[slice]:
    """Cut positions so that a chunk has at most `CHUNK_LOGITS` logits.

    Args:
        num_positions: The same on all ranks of a tensor-parallel group.
        num_rows: Rows of a vocabulary shard, padding included: those are the same on all ranks, while the
            last rank has fewer real ones. Ranks gather statistics chunk by chunk.

    >>> [(part.start, part.stop) for part in chunks(5, CHUNK_LOGITS // 2)]
    [(0, 2), (2, 4), (4, 5)]
    """
    size = max(1, CHUNK_LOGITS // max(num_rows, 1))
    size = size // 128 * 128 or size  # whole tiles of a matrix product
    return [
        slice(start, min(start + size, num_positions)) for start in range(0, num_positions, size)
    ]


def multiply(hidden: Tensor, columns: Tensor) -> Tensor:
    """Logits of a chunk [c, v/tp] in float32, not rounded to the dtype of the factors."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, columns, out_dtype=torch.float32)
    return (hidden @ columns).float()


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a matrix product to a float32 sum."""
    if total.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


def chunk_statistics(logits: Tensor, local_labels: Tensor) -> Tensor:
    """What the loss needs of a shard's logits.

    Args:
        logits: [c, v/tp] float32.
        local_labels: Row of the label in this shard [c]; out of range where another shard has it.
    Returns: [3, c] float32: log-sum-exp, maximum, and the label's logit (-inf if not in this shard).
    """
    if logits.size(1) == 0:
        return logits.new_full((3, logits.size(0)), -torch.inf)
    if logits.is_cuda:
        from megatron_long.model.cross_entropy_kernels import row_statistics

        return row_statistics(logits, local_labels)
    is_local = (local_labels >= 0) & (local_labels < logits.size(1))
    found = logits.gather(1, local_labels.clamp(0, logits.size(1) - 1)[:, None])[:, 0]
    label_logits = found.masked_fill(~is_local, -torch.inf)
    return torch.stack([torch.logsumexp(logits, dim=-1), logits.amax(dim=-1), label_logits])


def gather_statistics(statistics: Tensor, group: ProcessGroup | None) -> Tensor:
    """Statistics of every vocabulary shard [tp, 3, c]."""
    if group is None or group.size() == 1:
        return statistics[None]
    gathered = statistics.new_empty(group.size(), *statistics.shape)
    torch.distributed.all_gather_into_tensor(gathered.view(-1), statistics.view(-1), group=group)
    return gathered


def combine(shards: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the whole vocabulary [c], and the losses [c], from statistics [tp, 3, c]."""
    log_sum_exp = torch.logsumexp(shards[:, 0], dim=0)
    losses = log_sum_exp - shards[:, 2].amax(dim=0)
    return log_sum_exp, losses.masked_fill(labels == UNSCORED, 0.0)


def logit_gradient(
    logits: Tensor, log_sum_exp: Tensor, local_labels: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Gradient of the scaled losses by this shard's logits [c, v/tp]: scale * (softmax - one-hot)."""
    if logits.is_cuda:
        from megatron_long.model.cross_entropy_kernels import row_gradient

        return row_gradient(logits, log_sum_exp, local_labels, scale, dtype)
    grad = torch.exp(logits - log_sum_exp[:, None])
    is_local = (local_labels >= 0) & (local_labels < logits.size(1))
    index = local_labels.clamp(0, max(logits.size(1) - 1, 0))[:, None]
    if logits.size(1):
        grad.scatter_add_(1, index, -is_local[:, None].to(grad.dtype))
    return grad.mul_(scale[:, None]).to(dtype)


def deliver_weight_gradient(weight: Tensor, grad: Tensor) -> Tensor:
    """Accumulate a float32 gradient in Megatron's buffer, and return what autograd should see.

    With a gradient buffer (`main_grad`) the sum stays in float32 and autograd gets a placeholder, zero
    where the parameter is shared with the embedding, whose own gradient autograd adds to it.
    """
    if not hasattr(weight, "main_grad"):
        return grad.to(weight.dtype)
    weight.main_grad.add_(grad)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    is_shared = getattr(weight, "zero_out_wgrad", False)
    return torch.zeros_like(weight) if is_shared else torch.empty_like(weight)
