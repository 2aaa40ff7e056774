"""A small Llama with its Megatron checkpoint, and a way to train it on GPUs.

`GPU_RESULTS=results.jsonl pytest tests/gpu -n 14` writes each result as it comes, so that a time limit loses
none of them.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append the outcome of a test, its seconds and the end of what it says to `GPU_RESULTS`."""
    path = os.environ.get("GPU_RESULTS")
    if not path or os.environ.get("PYTEST_XDIST_WORKER"):
        return  # with xdist the controller hears of every test
    if report.when == "call" or report.outcome != "passed":
        result = {"test": report.nodeid, "when": report.when, "outcome": report.outcome}
        result["seconds"] = round(report.duration, 1)
        result["text"] = (report.longreprtext or report.capstdout)[-3000:]
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A random Hugging Face Llama of sizes that FP8 takes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("hf") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer.read_bytes())
    return folder


@pytest.fixture(scope="session")
def megatron_model(hf_model: Path, run_job: Callable) -> Path:
    """The same as a Megatron checkpoint."""
    output = hf_model.parent / "megatron"
    command = ["tools/convert_checkpoint.py", "hf-to-megatron", "--input", hf_model]
    run_job(1, [*command, "--output", output])
    return output


@pytest.fixture(scope="session")
def train(
    run_job: Callable, tiny_dataset: Path, megatron_model: Path
) -> Callable[..., list[float]]:
    """Train some steps from the checkpoint and give the loss of each."""

    def run(num_gpus: int, folder: Path, *flags: str, steps: int = 8) -> list[float]:
        log = folder / "loss.jsonl"
        command = ["-m", "megatron_long.pretrain", "--recipe", "tiny_debug", "--seq-length", "512"]
        command += ["--dataset", tiny_dataset, "--load", megatron_model, "--finetune"]
        command += ["--allow-repeat"]
        command += ["--global-batch-size", "4", "--train-iters", str(steps), "--loss-log", str(log)]
        run_job(num_gpus, [*command, *flags])
        return [json.loads(line)["lm loss"] for line in log.read_text().splitlines()]

    return run
