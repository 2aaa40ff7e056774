"""FP8 states of Transformer Engine's modules: read as they were written, and no hostile one is run."""

from pathlib import Path

import pytest
import torch

from megatron_long.pickles import UnpicklingError, guard_checkpoints
from tests import hostile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
RECIPES = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling")


def make_linear(recipe: str) -> torch.nn.Module:
    """A layer that has computed in FP8 once, so that it has a state."""
    te = pytest.importorskip("transformer_engine.pytorch")
    from transformer_engine.common import recipe as recipes

    layer = te.Linear(256, 256, bias=False, params_dtype=torch.bfloat16)
    with te.fp8_autocast(enabled=True, fp8_recipe=getattr(recipes, recipe)()):
        layer(torch.randn(128, 256, device="cuda", dtype=torch.bfloat16))
    return layer


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_state_is_read_as_it_was_written(recipe):
    guard_checkpoints()
    state = make_linear(recipe).get_extra_state()
    other = make_linear(recipe)
    other.set_extra_state(state)
    assert type(other.fp8_meta["recipe"]).__name__ == recipe
    assert torch.equal(other.get_extra_state(), state)


def test_a_hostile_state_is_refused(tmp_path: Path):
    guard_checkpoints()
    layer, marker = make_linear("Float8CurrentScaling"), tmp_path / "marker"
    state = torch.frombuffer(bytearray(hostile.raw(marker)), dtype=torch.uint8)
    with pytest.raises(UnpicklingError):
        layer.set_extra_state(state)
    assert not marker.exists()
