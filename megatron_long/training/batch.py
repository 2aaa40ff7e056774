"""The loss of one micro-batch from a data iterator, on every rank of a layout.

Legend: b micro-batch, s sequence of the whole window; rank-local sizes carry `/cp`.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_long.flags.arguments import LongContextArguments
from megatron_long.model.attention import zigzag_shard
from megatron_long.model.document_masks import AttentionFormat, offsets_of, split_batch
from megatron_long.training.loss import chunked_loss

LOSS_KEY = "lm loss"
PADDING_KEY = "padding share"
FIELDS = {
    "tokens": torch.int64,
    "labels": torch.int64,
    "loss_mask": torch.float32,
    "position_ids": torch.int64,
}
"""Fields of a sample that the model needs, as named by stock `GPTDataset` and `PackedDataset`."""
STARTS_FIELD = "document_starts"
"""Whether a document begins at a token; from `PackedDataset` if documents are masked."""


@dataclass(frozen=True)
class StepSettings:
    """Settings of a rank for a micro-batch."""

    micro_batch_size: int
    eval_micro_batch_size: int
    seq_length: int
    output_processor: Callable[..., Tensor] | None = None
    """Replaces Megatron's output layer and loss, see `training.loss`."""
    document_masking: AttentionFormat | None = None
    """Attention that is given masks between documents; None for none, see `model.document_masks`."""
    sequence_parallel_size: int = 1
    """Tensor-parallel ranks that a sequence is split over, in addition to the context-parallel ones."""
    on_micro_batch: Callable[[], None] | None = None
    """Called before each micro-batch, in training and evaluation."""
    on_loss: Callable[[Tensor], None] | None = None
    """Receives (loss sum, tokens) [2] of this rank's shard of each training micro-batch."""


def step_settings(
    arguments: LongContextArguments,
    args: Namespace,
    vocab_size: Callable[[], int],
    on_micro_batch: Callable[[], None],
    on_loss: Callable[[Tensor], None],
) -> StepSettings:
    """Settings of a micro-batch from the flags.

    Args:
        vocab_size: Returns the number of real tokens of the model.
    """
    masking = attention_format(args) if arguments.document_masking else None
    return StepSettings(
        args.micro_batch_size,
        args.eval_micro_batch_size,
        args.seq_length,
        None if arguments.megatron_loss else partial(chunked_loss, vocab_size()),
        masking,
        args.tensor_model_parallel_size if args.sequence_parallel else 1,
        on_micro_batch,
        on_loss,
    )


def attention_format(args: Namespace) -> AttentionFormat:
    """How document masks are passed to the attention in use, see `model.document_masks`."""
    return "thd" if args.transformer_impl == "transformer_engine" else "sbhd"


@dataclass
class Batch:
    """This rank's part of a micro-batch; all None on an inner pipeline stage."""

    tensors: dict[str, Any]
    """Each of `FIELDS` as [b, s/cp], or [1, t/cp] with padded documents."""
    packed_seq_params: Any = None
    """Megatron's `PackedSeqParams` if documents are masked, on every stage."""
    num_padding: int | None = None
    """Number of padding tokens on this rank; None if nothing is padded."""


def get_batch(
    iterator: Iterator | None,
    size: tuple[int, int],
    vp_stage: int | None,
    settings: StepSettings,
) -> Batch:
    """This rank's part of the next micro-batch.

    Tensor-parallel rank 0 reads and broadcasts to its group; each context-parallel rank keeps its two
    chunks of the window, or of each document. Pipeline stages between the first and the last need only
    the document bounds.

    Args:
        size: (b, s) of the micro-batch before it is split.
    """
    is_edge = _is_edge_stage(vp_stage)
    masking = settings.document_masking
    if not is_edge and masking is None:
        return Batch(dict.fromkeys(FIELDS))
    sample = None
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        assert iterator is not None
        sample = next(iterator)
    whole = {
        name: _share(sample, name, dtype, size)
        for name, dtype in (FIELDS if is_edge else {}).items()
    }
    rank = parallel_state.get_context_parallel_rank()
    cp = parallel_state.get_context_parallel_world_size()
    if masking is None:
        return Batch(
            {name: zigzag_shard(tensor, rank, cp, dim=1) for name, tensor in whole.items()}
        )
    starts = _share(sample, STARTS_FIELD, torch.uint8, size)
    tensors, packed, num_padding = split_batch(
        whole or {STARTS_FIELD: starts},
        offsets_of(starts[0]),
        masking,
        rank=rank,
        cp=cp,
        tp=settings.sequence_parallel_size,
    )
    if not is_edge:
        return Batch(dict.fromkeys(FIELDS), packed)
    return Batch(tensors, packed, num_padding if masking == "thd" else None)


def _share(
    sample: dict[str, Tensor] | None, name: str, dtype: torch.dtype, size: tuple[int, int]
) -> Tensor:
    """A field of the sample that tensor-parallel rank 0 has read, on every rank of its group."""
    device = torch.cuda.current_device()
    if sample is not None:
        whole = sample[name].to(device=device, dtype=dtype, non_blocking=True)
    else:
        whole = torch.empty(size, dtype=dtype, device=device)
    source = parallel_state.get_tensor_model_parallel_src_rank()
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.broadcast(whole, source, group=group)
    return whole


def _is_edge_stage(vp_stage: int | None) -> bool:
    return parallel_state.is_pipeline_first_stage(
        ignore_virtual=False, vp_stage=vp_stage
    ) or parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)


def loss_function(
    loss_mask: Tensor,
    num_padding: int | None,
    losses: Tensor,
    on_loss: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the token losses of a micro-batch, as Megatron's token-weighted reduction expects.

    Args:
        loss_mask: Weight of each token [b, s/cp], float32.
        num_padding: Padding among these tokens, for the log; None omits it.
        losses: Token losses [b, s/cp], nats, or their masked sum (a scalar).
    Returns: Loss sum, number of tokens, and both together for the log, each of this rank's shard.
    """
    mask = loss_mask.reshape(-1).float()
    total = losses if losses.dim() == 0 else torch.sum(losses.reshape(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    report = torch.stack([total.detach(), num_tokens.to(total.dtype)])
    if on_loss is not None:
        on_loss(report.clone())  # Megatron may reduce the other one in place
    reports = {LOSS_KEY: report}
    if num_padding is not None:
        reports[PADDING_KEY] = report.new_tensor([num_padding, mask.numel()])
    return total, num_tokens, reports


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
    batch = get_batch(iterator, (rows, settings.seq_length), vp_stage, settings)
    tensors = batch.tensors
    output = model(
        tensors["tokens"],
        tensors["position_ids"],
        None,  # no dense mask: attention is causal
        labels=tensors["labels"],
        loss_mask=tensors["loss_mask"],
        packed_seq_params=batch.packed_seq_params,
        output_processor=settings.output_processor,
    )
    # A validation loss is the only figure that Megatron's evaluation expects.
    num_padding = batch.num_padding if model.training else None
    on_loss = settings.on_loss if model.training else None
    return output, partial(loss_function, tensors["loss_mask"], num_padding, on_loss=on_loss)
