"""A rank's block, read by its slices, is what cutting the whole Megatron tensor gives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_long.conversion.formats.hf_folder import HfWeights
from megatron_long.conversion.slices import RowRun, read_block, row_runs
from megatron_long.model.geometry import LlamaGeometry, geometry_from_hf
from megatron_long.model.mapping import QKV, RULES, Unit, megatron_shape


@pytest.fixture(scope="module")
def model(make_llama) -> tuple[Path, LlamaGeometry]:
    """Biases, and a vocabulary of 1000 in 1024 rows."""
    folder = make_llama(family="qwen2")
    return folder, geometry_from_hf(folder)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.megatron_key)
@pytest.mark.parametrize("parts", [1, 4])
def test_blocks_put_together_are_the_tensor(model, rule, parts):
    folder, geometry = model
    unit = Unit(rule, 1 if rule.is_per_layer else None)
    shape, axis = megatron_shape(rule, geometry), rule.tensor_parallel_axis or 0
    size = shape[axis] // parts
    with HfWeights(folder) as weights:
        whole = rule.layout.to_megatron([weights.read(name) for name in unit.hf_names], geometry)
        for part in range(parts):
            offset, block_shape = [0] * len(shape), list(shape)
            offset[axis], block_shape[axis] = part * size, size
            block = read_block(unit, weights, geometry, offset, block_shape)
            assert torch.equal(block, whole.narrow(axis, part * size, size))


def test_only_the_rows_of_the_block_are_asked_for(model):
    """Of 8 heads in 2 groups, the first of 4 ranks holds 3/4 of the first group's queries."""
    _, geometry = model
    rows = megatron_shape(RULES[2], geometry)[0] // 4
    assert row_runs(QKV, geometry, 0, rows) == [RowRun(0, 0, rows)]
    assert row_runs(QKV, geometry, rows, rows) == [
        RowRun(0, rows, 32 - rows),
        RowRun(1, 0, 8),
        RowRun(2, 0, 8),
    ]
    wider = replace(geometry, padded_vocab_size=1280)
    assert row_runs(RULES[0].layout, wider, 960, 320) == [RowRun(0, 960, 40), RowRun(None, 0, 280)]
