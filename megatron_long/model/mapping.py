"""Where each Hugging Face tensor is in a Megatron checkpoint: one table, used in both directions.

Megatron stacks the layers of a tensor on axis 0 of its checkpoint; the table speaks of one layer.
RoPE needs no permutation: Hugging Face's `rotate_half` is Megatron's non-interleaved layout.
Legend: v vocabulary, h hidden, f feed-forward, n heads, g KV groups, d head size.

Source: Megatron-Core 0.19.2, `GPTModel.sharded_state_dict` with either layer specification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_long.model.geometry import LlamaGeometry

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the Hugging Face tensors of one rule are arranged in the Megatron tensor."""

    hf_shapes: Callable[[LlamaGeometry], list[Shape]]
    to_megatron: Callable[[Sequence[Tensor], LlamaGeometry], Tensor]
    to_hf: Callable[[Tensor, LlamaGeometry], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class TensorRule:
    """One row of the table."""

    megatron_key: str
    hf_names: tuple[str, ...]
    """Hugging Face names, with `{layer}` where there is one tensor for each layer."""
    layout: Layout
    tensor_parallel_axis: int | None
    """Axis that Megatron cuts under tensor parallelism, layers not counted; None: replicated."""
    applies_to: Callable[[LlamaGeometry], bool] = lambda geometry: True
    """Whether a model has this tensor."""

    @property
    def is_per_layer(self) -> bool:
        return "{layer}" in self.hf_names[0]


@dataclass(frozen=True)
class Unit:
    """The smallest piece that is converted at a time: one rule at one layer."""

    rule: TensorRule
    layer: int | None

    @property
    def hf_names(self) -> list[str]:
        return [name.format(layer=self.layer) for name in self.rule.hf_names]


def units_of(geometry: LlamaGeometry) -> Iterator[Unit]:
    """Yield every piece of a model, layer by layer, in Hugging Face's order."""
    rules = rules_of(geometry)
    per_layer = [rule for rule in rules if rule.is_per_layer]
    yield Unit(rules[0], None)
    for layer in range(geometry.num_layers):
        yield from (Unit(rule, layer) for rule in per_layer)
    yield from (Unit(rule, None) for rule in rules[1:] if not rule.is_per_layer)


def rules_of(geometry: LlamaGeometry) -> list[TensorRule]:
    """Return the rows that apply to a model."""
    return [rule for rule in RULES if rule.applies_to(geometry)]


def megatron_shape(rule: TensorRule, geometry: LlamaGeometry) -> Shape:
    """Return the shape of one layer of a Megatron tensor, without the axis of the layers."""
    import torch

    tensors = [torch.empty(shape, device="meta") for shape in rule.layout.hf_shapes(geometry)]
    return tuple(rule.layout.to_megatron(tensors, geometry).shape)


def checkpoint_shape(rule: TensorRule, geometry: LlamaGeometry) -> Shape:
    """Return the shape of a tensor in the checkpoint, layers stacked on axis 0."""
    layers = (geometry.num_layers,) if rule.is_per_layer else ()
    return layers + megatron_shape(rule, geometry)


def _copy(hf_shape: Callable[[LlamaGeometry], Shape]) -> Layout:
    """One tensor, the same on both sides."""
    return Layout(
        hf_shapes=lambda geometry: [hf_shape(geometry)],
        to_megatron=lambda tensors, _: tensors[0],
        to_hf=lambda tensor, _: [tensor],
    )


def _vocabulary_shapes(geometry: LlamaGeometry) -> list[Shape]:
    return [(geometry.vocab_size, geometry.hidden_size)]


def _pad_vocabulary(tensors: Sequence[Tensor], geometry: LlamaGeometry) -> Tensor:
    """[v, h] -> [padded v, h]; the rows of no token are zero."""
    import torch

    missing_rows = geometry.padded_vocab_size - geometry.vocab_size
    if not missing_rows:
        return tensors[0]
    return torch.nn.functional.pad(tensors[0], (0, 0, 0, missing_rows))


def _strip_vocabulary(tensor: Tensor, geometry: LlamaGeometry) -> list[Tensor]:
    return [tensor[: geometry.vocab_size]]


def _qkv_shapes(geometry: LlamaGeometry) -> list[Shape]:
    query_rows = geometry.num_attention_heads * geometry.kv_channels
    key_rows = geometry.num_query_groups * geometry.kv_channels
    return [(rows, geometry.hidden_size) for rows in (query_rows, key_rows, key_rows)]


def _qkv_bias_shapes(geometry: LlamaGeometry) -> list[Shape]:
    return [shape[:1] for shape in _qkv_shapes(geometry)]


def _merge_qkv(tensors: Sequence[Tensor], geometry: LlamaGeometry) -> Tensor:
    """q [n*d, h], k and v [g*d, h] -> [g * (n/g + 2) * d, h]: the queries, key, value of each group.

    A bias is the same without h.
    """
    import torch

    rows_by_group = (geometry.num_query_groups, -1)
    groups = [tensor.reshape(*rows_by_group, *tensor.shape[1:]) for tensor in tensors]
    return torch.cat(groups, dim=1).flatten(0, 1)


def _split_qkv(tensor: Tensor, geometry: LlamaGeometry) -> list[Tensor]:
    heads_per_group = geometry.num_attention_heads // geometry.num_query_groups
    rows = [count * geometry.kv_channels for count in (heads_per_group, 1, 1)]
    groups = tensor.reshape(geometry.num_query_groups, sum(rows), *tensor.shape[1:])
    return [part.flatten(0, 1) for part in groups.split(rows, dim=1)]


def _gate_up_shapes(geometry: LlamaGeometry) -> list[Shape]:
    return [(geometry.ffn_hidden_size, geometry.hidden_size)] * 2


def _merge_gate_up(tensors: Sequence[Tensor], geometry: LlamaGeometry) -> Tensor:
    """Gate and up [f, h] -> [2f, h]."""
    import torch

    return torch.cat(list(tensors))


def _split_gate_up(tensor: Tensor, geometry: LlamaGeometry) -> list[Tensor]:
    return list(tensor.chunk(2))


VOCABULARY = Layout(
    hf_shapes=_vocabulary_shapes, to_megatron=_pad_vocabulary, to_hf=_strip_vocabulary
)
QKV = Layout(hf_shapes=_qkv_shapes, to_megatron=_merge_qkv, to_hf=_split_qkv)
QKV_BIAS = Layout(hf_shapes=_qkv_bias_shapes, to_megatron=_merge_qkv, to_hf=_split_qkv)
GATE_UP = Layout(hf_shapes=_gate_up_shapes, to_megatron=_merge_gate_up, to_hf=_split_gate_up)
NORM = _copy(lambda geometry: (geometry.hidden_size,))
ATTENTION_OUTPUT = _copy(
    lambda geometry: (geometry.hidden_size, geometry.num_attention_heads * geometry.kv_channels)
)
DOWN = _copy(lambda geometry: (geometry.hidden_size, geometry.ffn_hidden_size))

_HF_LAYER = "model.layers.{layer}."
_MEGATRON_LAYER = "decoder.layers."

OUTPUT_LAYER = TensorRule(
    megatron_key="output_layer.weight",
    hf_names=("lm_head.weight",),
    layout=VOCABULARY,
    tensor_parallel_axis=0,
    applies_to=lambda geometry: not geometry.tie_embeddings,
)

RULES: tuple[TensorRule, ...] = (
    TensorRule(
        megatron_key="embedding.word_embeddings.weight",
        hf_names=("model.embed_tokens.weight",),
        layout=VOCABULARY,
        tensor_parallel_axis=0,
    ),
    TensorRule(
        megatron_key=_MEGATRON_LAYER + "self_attention.linear_qkv.layer_norm_weight",
        hf_names=(_HF_LAYER + "input_layernorm.weight",),
        layout=NORM,
        tensor_parallel_axis=None,
    ),
    TensorRule(
        megatron_key=_MEGATRON_LAYER + "self_attention.linear_qkv.weight",
        hf_names=tuple(_HF_LAYER + f"self_attn.{part}_proj.weight" for part in "qkv"),
        layout=QKV,
        tensor_parallel_axis=0,
    ),
    TensorRule(
        megatron_key=_MEGATRON_LAYER + "self_attention.linear_qkv.bias",
        hf_names=tuple(_HF_LAYER + f"self_attn.{part}_proj.bias" for part in "qkv"),
        layout=QKV_BIAS,
        tensor_parallel_axis=0,
        applies_to=lambda geometry: geometry.add_qkv_bias,
    ),
    TensorRule(
        megatron_key=_MEGATRON_LAYER + "self_attention.linear_proj.weight",
        hf_names=(_HF_LAYER + "self_attn.o_proj.weight",),
        layout=ATTENTION_OUTPUT,
        tensor_parallel_axis=1,
    ),
    TensorRule(
        megatron_key=_MEGATRON_LAYER + "mlp.linear_fc1.layer_norm_weight",
        hf_names=(_HF_LAYER + "post_attention_layernorm.weight",),
        layout=NORM,
        tensor_parallel_axis=None,
    ),
    TensorRule(
        megatron_key=_MEGATRON_LAYER + "mlp.linear_fc1.weight",
        hf_names=(_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        layout=GATE_UP,
        tensor_parallel_axis=0,
    ),
    TensorRule(
        megatron_key=_MEGATRON_LAYER + "mlp.linear_fc2.weight",
        hf_names=(_HF_LAYER + "mlp.down_proj.weight",),
        layout=DOWN,
        tensor_parallel_axis=1,
    ),
    TensorRule(
        megatron_key="decoder.final_layernorm.weight",
        hf_names=("model.norm.weight",),
        layout=NORM,
        tensor_parallel_axis=None,
    ),
    OUTPUT_LAYER,
)

EXTRA_STATE_MODULES = (
    "decoder.layers.self_attention.linear_qkv",
    "decoder.layers.self_attention.linear_proj",
    "decoder.layers.mlp.linear_fc1",
    "decoder.layers.mlp.linear_fc2",
    "decoder.final_layernorm",
)
"""Modules whose `_extra_state` (FP8 scales; None in a new checkpoint) Megatron asks for on loading."""
