"""A small Llama with its Megatron checkpoint, and a way to train it on GPUs.

`GPU_RESULTS=results.jsonl pytest tests/gpu -n 14 --dist load --maxschedchunk 1` writes each result as it
comes, so that a time limit loses none of them, and gives each worker that is free the longest test left.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

LONGEST = (
    "test_fp8_follows_bf16_on_real_text",
    "test_the_rate_can_be_changed_on_resume",
    "test_resume_is_bit_exact",
    "test_saving_in_the_background_gives_the_same_checkpoints",
    "test_later_tokens_leave_earlier_losses",
    "test_checkpoint_of_transformer_engine_scores_and_exports",
    "test_flash_attention_agrees_with_cudnn",
)
"""Tests that take 100 to 400 s on two GPUs shared by 14 workers, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest tests of this folder first."""
    folder = Path(__file__).parent
    places = [place for place, item in enumerate(items) if item.path.is_relative_to(folder)]

    def position(item: pytest.Item) -> int:
        name = item.name.partition("[")[0]
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    ordered = sorted((items[place] for place in places), key=position)
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


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
