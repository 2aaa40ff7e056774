"""vLLM serves the exported folders as transformers does; VLLM_PYTHON names an interpreter that has it."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_long.conversion.convert import hf_to_megatron
from megatron_long.conversion.export import megatron_to_hf
from megatron_long.conversion.stretch import Stretch

PROGRAM = Path(__file__).with_name("vllm_tokens.py")
PYTHON = os.environ.get("VLLM_PYTHON")
CONTEXT = 2048
PROMPT_TOKENS = 1500
NEW_TOKENS = 32
TOLERANCE = 1e-4
WIDE = {"hidden_size": 256, "intermediate_size": 384}  # heads of 32, as vLLM's kernels want
MODELS = {
    "llama-llama3": ({}, Stretch(rope_method="llama3", rope_factor=4.0)),
    "smollm2-base": ({"tied": True}, Stretch(rope_theta=2e6, context_length=CONTEXT)),
    "mistral-linear": ({"family": "mistral"}, Stretch(rope_method="linear", rope_factor=4.0)),
    "qwen2-yarn": ({"family": "qwen2"}, Stretch(rope_method="yarn", rope_factor=4.0)),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON does not name an interpreter with vLLM"),
]


def serve(folder: Path, prompt: list[int], work: Path) -> dict:
    """What vLLM answers."""
    case, output = work / "case.json", work / "output.json"
    case.write_text(json.dumps({"prompt": prompt, "num_new_tokens": NEW_TOKENS}))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(PYTHON), PROGRAM, folder, case, output],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("name", MODELS)
def test_vllm_answers_as_transformers_does(make_llama, tmp_path, name):
    """Greedy tokens, and the log probability of each token of a prompt beyond the model's old context."""
    from transformers import AutoModelForCausalLM

    options, stretch = MODELS[name]
    hf_to_megatron(make_llama(**WIDE, **options), tmp_path / "ckpt", stretch=stretch)
    megatron_to_hf(tmp_path / "ckpt", tmp_path / "hf")
    prompt = torch.randint(3, 1000, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1))
    seen = serve(tmp_path / "hf", prompt.tolist(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = model(prompt[None]).logits[0, :-1].log_softmax(-1)
        answer = model.generate(
            prompt[None], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
    expected = logprobs.gather(1, prompt[1:, None]).flatten()
    difference = float((torch.tensor(seen["logprobs"]) - expected).abs().max())
    print(f"{name}: largest difference of log probabilities {difference:.1e}")
    assert difference <= TOLERANCE
    assert seen["tokens"] == answer[0, PROMPT_TOKENS:].tolist()
    # vLLM takes max_position_embeddings under linear RoPE for the length before the stretch.
    longer = stretch.rope_factor if stretch.rope_method == "linear" else 1
    assert seen["max_model_len"] == CONTEXT * (longer or 1)
