"""The table: complete, reversible, and in Megatron's order of query groups."""

from pathlib import Path

import pytest
import torch

from megatron_long.model.geometry import LlamaGeometry, geometry_from_hf
from megatron_long.model.mapping import QKV, RULES, checkpoint_shape, rules_of, units_of

GEOMETRY = LlamaGeometry(
    num_layers=3,
    hidden_size=8,
    ffn_hidden_size=6,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=2,
    vocab_size=5,
    padded_vocab_size=8,
    norm_epsilon=1e-5,
    rotary_base=10000.0,
    max_position_embeddings=16,
    tie_embeddings=False,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.megatron_key)
def test_each_layout_is_undone_exactly(rule):
    tensors = [torch.randn(shape) for shape in rule.layout.hf_shapes(GEOMETRY)]
    back = rule.layout.to_hf(rule.layout.to_megatron(tensors, GEOMETRY), GEOMETRY)
    assert len(back) == len(tensors) == len(rule.hf_names)
    for one, other in zip(tensors, back, strict=True):
        assert torch.equal(one, other)


def test_qkv_rows_go_by_query_group():
    """4 heads in 2 groups of head size 2: [q0 q1 k0 v0 | q2 q3 k1 v1]."""
    rows = [100.0 + torch.arange(8), 200.0 + torch.arange(4), 300.0 + torch.arange(4)]
    q, k, v = (part[:, None].expand(-1, 8) for part in rows)
    merged = QKV.to_megatron([q, k, v], GEOMETRY)[:, 0].tolist()
    assert merged[:8] == [100, 101, 102, 103, 200, 201, 300, 301]
    assert merged[8:] == [104, 105, 106, 107, 202, 203, 302, 303]


def test_vocabulary_is_padded_with_zeros():
    embedding = RULES[0]
    padded = embedding.layout.to_megatron([torch.ones(5, 8)], GEOMETRY)
    assert padded.shape == (8, 8)
    assert padded[:5].min() == 1.0
    assert padded[5:].abs().max() == 0.0


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_names_every_tensor_of_transformers(make_llama, read_weights, tied):
    folder: Path = make_llama(tied=tied)
    seen = {name: tuple(tensor.shape) for name, tensor in read_weights(folder).items()}
    geometry = geometry_from_hf(folder)
    expected = {}
    for unit in units_of(geometry):
        shapes = unit.rule.layout.hf_shapes(geometry)
        expected |= dict(zip(unit.hf_names, shapes, strict=True))
    assert expected == seen


def test_layers_are_stacked_on_axis_0():
    shapes = {rule.megatron_key: checkpoint_shape(rule, GEOMETRY) for rule in rules_of(GEOMETRY)}
    assert shapes["decoder.layers.self_attention.linear_qkv.weight"] == (3, 16, 8)
    assert shapes["decoder.layers.mlp.linear_fc1.weight"] == (3, 12, 8)
    assert shapes["decoder.final_layernorm.weight"] == (8,)
    assert shapes["output_layer.weight"] == (8, 8)
