"""Filling a built model: what it refuses, and what the optimizer finds. Layouts: see test_layouts.py."""

import pytest
import torch

from megatron_long.conversion.formats.hf_folder import HfWeights
from megatron_long.engine import host_backend
from megatron_long.errors import ConfigError
from megatron_long.model.geometry import geometry_from_hf

host_backend.install()

from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402

from megatron_long.conversion.straight_start import fill_model  # noqa: E402

NORM = "decoder.final_layernorm.weight"


class Chunk(torch.nn.Module):
    """A stage that holds one parameter."""

    def __init__(self, key: str, size: int) -> None:
        super().__init__()
        self.key = key
        self.weight = torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16))

    def sharded_state_dict(self) -> dict:
        return {"weight": ShardedTensor.from_rank_offsets(self.key, self.weight)}


def fill(folder, chunk: Chunk) -> None:
    with HfWeights(folder) as weights:
        fill_model([chunk], weights, geometry_from_hf(folder))


@pytest.mark.parametrize(
    ("key", "size", "message"),
    [
        (
            "mtp.layers.0.weight",
            64,
            "build a model with mtp.layers.0.weight, which .* does not contain",
        ),
        (NORM, 63, r"build decoder.final_layernorm.weight as \[63\], and .* holds \[64\]"),
    ],
)
def test_another_model_is_refused(make_llama, key, size, message):
    with pytest.raises(ConfigError, match=message):
        fill(make_llama(), Chunk(key, size))


def test_the_main_copy_of_an_fp8_parameter_keeps_every_bit(make_llama, read_weights):
    """Transformer Engine keeps what an FP8 parameter was made from for the optimizer's main copy."""
    folder = make_llama()
    exact = read_weights(folder)["model.norm.weight"]
    chunk = Chunk(NORM, 64)
    chunk.weight._high_precision_init_val = torch.full((64,), 7.0)
    fill(folder, chunk)
    assert torch.equal(chunk.weight._high_precision_init_val, exact)
    assert torch.equal(chunk.weight, exact.bfloat16())
