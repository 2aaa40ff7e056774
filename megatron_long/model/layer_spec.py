"""Which modules a layer consists of, and which model class holds them: defined only here."""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_long.model.attention import ContextParallelAttention


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the mark that Megatron needs under sequence parallelism.

    The mark asks for the weight's gradient to be summed over the tensor-parallel group; Megatron's own
    `WrappedTorchNorm` lacks it and refuses sequence parallelism (0.19.2).
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def portable_block_spec(
    model_config: Any, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Layers of a Llama block without Transformer Engine, for `GPTModelConfig.transformer_layer_spec`.

    The parameters keep the checkpoint names of the Transformer Engine block, so that a checkpoint
    saved with either loads with the other.

    Args:
        model_config: Megatron's GPTModelConfig, or a TransformerConfig.
        vp_stage: Virtual pipeline stage of this model chunk.
    """
    config: TransformerConfig = getattr(model_config, "transformer", model_config)
    layer = get_gpt_layer_local_spec(normalization=config.normalization)
    if config.normalization == "RMSNorm":
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = ContextParallelAttention
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
