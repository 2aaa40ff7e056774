"""Straight start and export with Transformer Engine, FP8 parameters among it. One GPU."""

from pathlib import Path

import pytest
import torch

from megatron_long.conversion.export import megatron_to_hf
from megatron_long.conversion.formats.hf_folder import HfWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FP8 = "--fp8-format hybrid --fp8-recipe tensorwise --fp8-param-gather".split()
STILL = "--lr 0 --min-lr 0 --weight-decay 0 --train-iters 1".split()
"""A step that changes nothing: what is saved is what was loaded."""


@pytest.mark.parametrize("flags", [[], FP8], ids=["bf16", "fp8-parameters"])
def test_what_is_loaded_straight_is_what_is_exported(
    flags, hf_model: Path, run_job, tiny_dataset, tmp_path: Path
):
    """FP8 rounds the model's parameters; the optimizer's main copy has the weights as they came."""
    command = ["-m", "megatron_long.pretrain", "--recipe", "tiny_debug", "--seq-length", "512"]
    command += ["--dataset", tiny_dataset, "--allow-repeat", "--global-batch-size", "4"]
    command += ["--hf-checkpoint", hf_model, "--save", tmp_path / "save"]
    command += ["--export-hf", tmp_path / "hf", *flags, *STILL]
    command += "--tensor-model-parallel-size 1 --context-parallel-size 1".split()
    run_job(1, command)
    with HfWeights(hf_model) as before, HfWeights(tmp_path / "hf") as after:
        assert sorted(before.names) == sorted(after.names)
        for name in before.names:
            assert torch.equal(before.read(name).bfloat16(), after.read(name)), name
    if not flags:
        return
    megatron_to_hf(tmp_path / "save", tmp_path / "rounded", weights="model")
    name = "model.layers.0.mlp.down_proj.weight"
    with HfWeights(hf_model) as before, HfWeights(tmp_path / "rounded") as rounded:
        exact, seen = before.read(name), rounded.read(name).float()
    assert not torch.equal(exact.bfloat16().float(), seen)
    assert (exact - seen).abs().max() < 0.07 * exact.abs().max()
