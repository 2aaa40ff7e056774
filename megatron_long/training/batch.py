"""From a data iterator to the loss of one micro-batch, on every rank of a layout.

Legend: b micro-batch, s sequence of the whole window; rank-local sizes carry `/cp`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_long.model.attention import zigzag_shard

LOSS_KEY = "lm loss"
FIELDS = {
    "tokens": torch.int64,
    "labels": torch.int64,
    "loss_mask": torch.float32,
    "position_ids": torch.int64,
}
"""What the model needs of a sample, as stock `GPTDataset` and `PackedDataset` name it."""


@dataclass(frozen=True)
class StepSettings:
    """What a rank must know to take part in a micro-batch."""

    micro_batch_size: int
    eval_micro_batch_size: int
    seq_length: int
    output_processor: Callable[..., Tensor] | None = None
    """Takes the place of Megatron's output layer and loss, see `training.loss`."""
    on_micro_batch: Callable[[], None] | None = None
    """Called before each micro-batch, in training and evaluation."""
    on_loss: Callable[[Tensor], None] | None = None
    """Told (loss sum, tokens) [2] of this rank's shard of each training micro-batch."""


def get_batch(
    iterator: Iterator | None, size: tuple[int, int], vp_stage: int | None
) -> dict[str, Any]:
    """This rank's part of the next micro-batch.

    Tensor-parallel rank 0 reads and broadcasts to its group; each context-parallel rank keeps its two
    chunks of the window. Pipeline stages between the first and the last get nothing, as they need none.

    Args:
        size: (b, s) of the micro-batch before it is cut.
    Returns: Each of `FIELDS` as [b, s/cp], or None on an inner stage.
    """
    if not _is_edge_stage(vp_stage):
        return dict.fromkeys(FIELDS)
    group = parallel_state.get_tensor_model_parallel_group()
    source = parallel_state.get_tensor_model_parallel_src_rank()
    sample = None
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        assert iterator is not None
        sample = next(iterator)
    device = torch.cuda.current_device()
    rank = parallel_state.get_context_parallel_rank()
    cp = parallel_state.get_context_parallel_world_size()
    batch: dict[str, Tensor] = {}
    for name, dtype in FIELDS.items():
        if sample is not None:
            whole = sample[name].to(device=device, dtype=dtype, non_blocking=True)
        else:
            whole = torch.empty(size, dtype=dtype, device=device)
        torch.distributed.broadcast(whole, source, group=group)
        batch[name] = zigzag_shard(whole, rank, cp, dim=1)
    return batch


def _is_edge_stage(vp_stage: int | None) -> bool:
    return parallel_state.is_pipeline_first_stage(
        ignore_virtual=False, vp_stage=vp_stage
    ) or parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)


def loss_function(
    loss_mask: Tensor, losses: Tensor, on_loss: Callable[[Tensor], None] | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the token losses of a micro-batch, as Megatron's token-weighted reduction wants them.

    Args:
        loss_mask: Weight of each token [b, s/cp], float32.
        losses: Token losses [b, s/cp], nats, or their masked sum (a scalar).
    Returns: Loss sum, number of tokens, and both together for the log, each of this rank's shard.
    """
    mask = loss_mask.reshape(-1).float()
    total = losses if losses.dim() == 0 else torch.sum(losses.reshape(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    report = torch.stack([total.detach(), num_tokens.to(total.dtype)])
    if on_loss is not None:
        on_loss(report.clone())  # Megatron may reduce the other one in place
    return total, num_tokens, {LOSS_KEY: report}


def forward_step(
    settings: StepSettings, iterator: Iterator | None, model: torch.nn.Module
) -> tuple[Tensor, Callable]:
    """Run one micro-batch, as Megatron's schedules call it (bind `settings` first).

    Returns: The model's output (token losses [b, s/cp] or their masked sum on the last stage) and the
        loss function.
    """
    if settings.on_micro_batch is not None:
        settings.on_micro_batch()
    rows = settings.micro_batch_size if model.training else settings.eval_micro_batch_size
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    batch = get_batch(iterator, (rows, settings.seq_length), vp_stage)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,  # no dense mask: attention is causal
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        output_processor=settings.output_processor,
    )
    on_loss = settings.on_loss if model.training else None
    return output, partial(loss_function, batch["loss_mask"], on_loss=on_loss)
