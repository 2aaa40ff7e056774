"""Models of known answers through the whole path: conversion, sharded forward pass, needle tool."""

import random
from pathlib import Path

import pytest
import torch

from megatron_long.evaluation.needle.cases import PROMPTS
from megatron_long.evaluation.needle.needle_report import read_needle_report

from .copying_model import save_copying_model

NEEDLE, QUESTION, ANSWER = (
    "eins zwei drei vier fünf sechs sieben",
    "was folgt ?",
    "vier fünf sechs sieben",
)
HAY = [f"hay{number}" for number in range(40)]
OTHER = " ".join([*PROMPTS["paper"], QUESTION, "a"]).replace("{question}", "").split()
WORDS = list(dict.fromkeys([*HAY, *NEEDLE.split(), *OTHER]))


@pytest.fixture(scope="module")
def haystack(tmp_path_factory) -> Path:
    generator = random.Random(0)
    sentences = [" ".join(generator.choices(HAY, k=generator.randrange(4, 12))) for _ in range(200)]
    path = tmp_path_factory.mktemp("hay") / "hay.txt"
    path.write_text("\n\n".join(sentences))
    return path


def test_the_model_says_what_followed_before(tmp_path):
    """The construction itself, in transformers."""
    from transformers import AutoModelForCausalLM

    folder = save_copying_model(tmp_path / "model", WORDS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randperm(len(WORDS), generator=torch.Generator().manual_seed(0))[:60] + 3
    twice = torch.cat([torch.tensor([1]), tokens, torch.full((400,), 2), tokens])[None]
    with torch.no_grad():
        predicted = model(twice).logits[0].argmax(-1)
    assert torch.equal(predicted[-60:-1], tokens[1:])


@pytest.mark.slow
@pytest.mark.parametrize(("distance", "score"), [(1, 1.0), (2, 0.0)], ids=["copying", "corrupted"])
def test_needle_scores_of_a_copying_model(distance, score, haystack, run_job, tmp_path):
    folder = save_copying_model(tmp_path / "hf", WORDS, distance=distance)
    convert = ["tools/convert_checkpoint.py", "hf-to-megatron", "--input", folder]
    run_job(1, [*convert, "--output", tmp_path / "ckpt"])
    command = [
        "tools/evaluate_needle.py",
        "--checkpoint",
        tmp_path / "ckpt",
        "--haystack",
        haystack,
    ]
    command += ["--needle", NEEDLE, "--question", QUESTION, "--answer", ANSWER]
    command += ["--context-length", 960, "--min-length", 100, "--num-lengths", 6, "--num-depths", 5]
    layout = ["--tensor-model-parallel-size", 2]
    command += ["--output-dir", tmp_path / "needle", *layout]
    run_job(2, command, fresh=score == 1)  # once as users start it, with torchrun
    cells = read_needle_report(tmp_path / "needle" / "needle.json").results
    assert len(cells) == 30
    print(
        "log-likelihoods",
        min(c.log_likelihood for c in cells),
        max(c.log_likelihood for c in cells),
    )
    assert {float(cell.is_exact) for cell in cells} == {score}
    if score == 1:
        assert min(cell.log_likelihood for cell in cells) > -0.01
        assert {cell.token_accuracy for cell in cells} == {1.0}
