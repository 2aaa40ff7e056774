"""The training loss: the masked loss sum from Megatron's hidden states, without the full logits."""

from typing import Any

from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from megatron_long.model.linear_cross_entropy import VocabularyShard, linear_cross_entropy


def chunked_loss(
    vocab_size: int,
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor,
    **_: Any,
) -> Tensor:
    """Output processor of `GPTModel.forward` (bind `vocab_size` first).

    Args:
        vocab_size: Real tokens; padding rows of the output layer get no probability.
        hidden_states: [s/cp, b, h], or [s/cp/tp, b, h] under sequence parallelism.
        output_layer: Megatron's ColumnParallelLinear.
        output_weight: The embedding's weight if it is shared, else None.
        labels: [b, s/cp]. loss_mask: [b, s/cp].
    Returns: Masked sum of this rank's token losses, a scalar, float32, nats.
    """
    prepare_weight(output_layer)
    weight = output_layer.weight if output_weight is None else output_weight
    if output_layer.sequence_parallel:
        hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states)
    else:
        hidden_states = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states)
    first = parallel_state.get_tensor_model_parallel_rank() * weight.size(0)
    loss_sum, _losses = linear_cross_entropy(
        hidden_states.reshape(-1, hidden_states.size(-1)),
        weight,
        labels.transpose(0, 1).reshape(-1),  # hidden states run sequence first
        loss_mask.transpose(0, 1).reshape(-1).float(),
        VocabularyShard(first, vocab_size),
        parallel_state.get_tensor_model_parallel_group(),
    )
    return loss_sum


def prepare_weight(output_layer: Any) -> None:
    """Synchronize the weight as a call of the layer would.

    `--overlap-param-gather` gathers parameters in a hook before a module's forward; a module that is never
    called would leave its gather open, and Megatron fails on that in the next step.
    """
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, ())
