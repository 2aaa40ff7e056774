"""One model, whatever layout loads it, from a Megatron checkpoint or straight from Hugging Face."""

from pathlib import Path

import pytest
import torch

from megatron_long.conversion.convert import hf_to_megatron

PROGRAM = Path(__file__).with_name("layout_logits.py")
TOLERANCE = 1e-4
LAYOUTS = {
    "tp2-pp2-vpp2": (
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
        "--num-virtual-stages-per-pipeline-rank 2",
        2,
    ),
    "tp2-cp2-of-one-group": ("--tensor-model-parallel-size 2 --context-parallel-size 2", 1),
}
"""Flags for four processes, and the model's key/value heads: one is shared by two ranks."""


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_are_those_of_transformers_in_every_layout(make_llama, run_job, tmp_path, name):
    """Biases, tied embeddings and padding rows among it."""
    from transformers import AutoModelForCausalLM

    layout, heads = LAYOUTS[name]
    shape = {"num_hidden_layers": 4, "num_key_value_heads": heads}
    source = make_llama(family="qwen2", tied=True, **shape)
    hf_to_megatron(source, tmp_path / "ckpt")
    tokens = torch.randint(0, 1000, (1, 128), generator=torch.Generator().manual_seed(2))
    torch.save(tokens, tmp_path / "tokens.pt")
    files = (tmp_path / "ckpt", source, tmp_path / "tokens.pt", tmp_path / "logits.pt")
    run_job(4, [PROGRAM, *files, *layout.split()])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source).eval()(tokens).logits
    for way, logits in torch.load(tmp_path / "logits.pt").items():
        difference = float((logits[..., :1000] - expected).abs().max())
        print(f"{name}, {way}: largest difference {difference:.1e}")
        assert difference <= TOLERANCE
