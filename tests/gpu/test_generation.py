"""Greedy generation on GPUs: in FP32 the tokens of transformers, in BF16 tokens about as likely as these."""

from pathlib import Path

import pytest
import torch

from tests.evaluation.generation_worker import CONTEXT, NUM_NEW, make_prompts

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
WORKER = Path(__file__).parents[1] / "evaluation" / "generation_worker.py"
NEAR = 0.1
"""Of the logits' standard deviation: how far a token's may be below the largest, as BF16 rounds both."""
LAYOUTS = {
    "one": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "cp2": (2, ["--context-parallel-size", "2"]),
    "cp2-a2a": (2, ["--context-parallel-size", "2", "--cp-comm-type", "a2a"]),
}
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS == 0, reason="no CUDA device")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama") / "hf"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=390,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(llama: Path, run_job) -> Path:
    output = llama.parent / "megatron"
    command = ["tools/convert_checkpoint.py", "hf-to-megatron", "--input", llama]
    run_job(1, [*command, "--output", output])
    return output


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_those_of_transformers(layout, precision, llama, checkpoint, run_job, tmp_path):
    from transformers import LlamaForCausalLM

    num_gpus, flags = LAYOUTS[layout]
    if num_gpus > NUM_GPUS:
        pytest.skip(f"{NUM_GPUS} CUDA devices")
    run_job(num_gpus, [WORKER, checkpoint, tmp_path / "seen.pt", -1, precision, *flags])
    seen = torch.load(tmp_path / "seen.pt")
    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32).cuda()
    for name in ("together", "alone"):
        for prompt, answer in zip(make_prompts(), seen[name], strict=True):
            assert len(answer) == NUM_NEW
            whole = torch.tensor([[*prompt.tolist(), *answer]]).cuda()
            with torch.no_grad():
                logits = model(whole).logits[0, len(prompt) - 1 : -1]
            below = logits.amax(-1) - logits.gather(1, whole[0, len(prompt) :, None])[:, 0]
            if precision == "fp32":
                assert torch.equal(logits.argmax(-1), whole[0, len(prompt) :])
            else:
                assert below.max() < NEAR * logits.std()
