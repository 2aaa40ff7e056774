"""Needle and loss on GPUs: rows of many lengths through Transformer Engine, against transformers in BF16."""

from pathlib import Path

import pytest
import torch

from megatron_long.evaluation.loss.loss_report import read_loss_report
from megatron_long.evaluation.needle.needle_report import read_needle_report

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
BF16_TOLERANCE = 0.05
"""Nats of a mean over some 30 tokens, of which each is some 6 nats in BF16."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS == 0, reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Path:
    sentences = [
        f"Page {number} tells of model {number * 7} and key {number % 13}" for number in range(900)
    ]
    path = tmp_path_factory.mktemp("story") / "story.txt"
    path.write_text(". ".join(sentences) + ".")
    return path


@pytest.fixture(scope="module")
def needle(story, run_job, tmp_path_factory):
    """Score a grid of many short cells and give them by key."""
    pytest.importorskip("nltk")

    def run(num_gpus: int, model: Path, *flags: str) -> dict:
        output = tmp_path_factory.mktemp("needle")
        command = ["tools/evaluate_needle.py", "--checkpoint", model, "--haystack", story]
        command += ["--context-length", 4096, "--min-length", 512, "--num-lengths", 7]
        command += ["--num-depths", 3, "--tasks", "sentence", "passkey", "--output-dir", output]
        run_job(num_gpus, [*command, *flags])
        return {cell.key: cell for cell in read_needle_report(output / "needle.json").results}

    return run


def largest_difference(seen: dict, expected: dict) -> float:
    assert len(seen) == 2 * 7 * 3
    assert seen.keys() == expected.keys()
    difference = max(abs(seen[key].log_likelihood - expected[key].log_likelihood) for key in seen)
    print(f"largest difference of a cell's log-likelihood {difference:.1e} nats per token")
    return difference


@pytest.fixture(scope="module")
def reference(needle, hf_model) -> dict:
    """By transformers in BF16 on the folder that the checkpoint was made of."""
    pytest.importorskip("rouge_score")
    return needle(1, hf_model, "--backend", "hf")


def test_needle_agrees_with_transformers(needle, megatron_model, reference):
    assert largest_difference(needle(1, megatron_model), reference) < BF16_TOLERANCE


@pytest.mark.multi_gpu
@pytest.mark.skipif(NUM_GPUS < 2, reason="one CUDA device")
@pytest.mark.parametrize(
    "flags",
    [
        ("--tensor-model-parallel-size", "2"),
        ("--pipeline-model-parallel-size", "2"),
        ("--context-parallel-size", "2", "--cp-comm-type", "a2a"),
        (),
    ],
    ids=["tp2", "pp2", "cp2-a2a", "dp2"],
)
def test_layouts_agree(flags, needle, megatron_model, reference):
    assert largest_difference(needle(2, megatron_model, *flags), reference) < BF16_TOLERANCE


def test_loss_agrees_with_transformers(run_job, megatron_model, hf_model, tiny_dataset, tmp_path):
    command = ["tools/evaluate_loss.py", "--dataset", tiny_dataset, "--context-length", "512"]
    for name, model, flags in (("ours", megatron_model, []), ("hf", hf_model, ["--backend", "hf"])):
        output = ["--checkpoint", model, "--output", tmp_path / f"{name}.json"]
        run_job(1, [*command, *output, *flags])
    seen, expected = (read_loss_report(tmp_path / f"{name}.json").loss for name in ("ours", "hf"))
    difference = abs(seen.mean(0, 512) - expected.mean(0, 512))
    print(f"mean loss {seen.mean(0, 512):.4f}, difference to transformers {difference:.1e}")
    assert difference < BF16_TOLERANCE
