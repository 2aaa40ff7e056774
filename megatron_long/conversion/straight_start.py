"""Fill a built, sharded Megatron model from Hugging Face weights; each rank reads only its slices.

The model itself reports what a rank holds: its `sharded_state_dict` names, for every parameter, the
tensor of the whole model and the block of it, for any tensor, pipeline, virtual pipeline or context
parallelism, and any type of layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_long.conversion.slices import read_block
from megatron_long.engine.optimizer_shards import parameters_of
from megatron_long.errors import ConfigError
from megatron_long.model.geometry import LlamaGeometry
from megatron_long.model.mapping import TensorRule, Unit, checkpoint_shape, rules_of

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_long.conversion.formats.weights import Weights


@torch.no_grad()
def fill_model(
    chunks: Iterable[torch.nn.Module], weights: Weights, geometry: LlamaGeometry
) -> None:
    """Copy weights into the model chunks of this rank.

    To be called before the optimizer is built, which takes its main parameters from the model's.

    Args:
        chunks: The pipeline stages that this rank holds, not yet wrapped.
        weights: Checked Hugging Face weights of the model.
        geometry: Its shape, with the padding of the vocabulary that the model was built with.
    Raises: ConfigError: the flags built another model.
        DataError: the weights hold NaN or infinity.
    """
    rules = {rule.megatron_key: rule for rule in rules_of(geometry)}
    for chunk in chunks:
        for entry in parameters_of(chunk):
            if isinstance(entry, ShardedTensorFactory):
                # SwiGLU: gate and up are split separately and concatenated.
                plan = replace(entry, data=torch.empty(entry.data.shape, device="meta")).build()
                parts = dict_list_map_outplace(
                    lambda part: _read(part, rules, weights, geometry), plan
                )
                _put(entry.data, entry.merge_fn(parts))
            else:
                _put(entry.data, _read(entry, rules, weights, geometry))


def _read(
    part: ShardedTensor, rules: dict[str, TensorRule], weights: Weights, geometry: LlamaGeometry
) -> Tensor:
    rule = rules.get(part.key)
    if rule is None:
        raise ConfigError(
            f"the flags build a model with {part.key}, which {weights.location} does not contain; drop "
            "the flags that extend the model of its configuration"
        )
    expected = checkpoint_shape(rule, geometry)
    if tuple(part.global_shape) != expected:
        raise ConfigError(
            f"the flags build {part.key} as {list(part.global_shape)}, and {weights.location} holds "
            f"{list(expected)}; drop the flags that change the model's shape"
        )
    layer, offset = None, list(part.global_offset)
    if rule.is_per_layer:
        layer, offset = offset[0], offset[1:]
    return read_block(Unit(rule, layer), weights, geometry, offset, part.local_shape)


def _put(parameter: Tensor, value: Tensor) -> None:
    if hasattr(parameter, "_high_precision_init_val"):
        # An FP8 parameter: the optimizer takes its main copy from here, not from the eight bits.
        parameter._high_precision_init_val = value.clone()
    parameter.copy_(value)
