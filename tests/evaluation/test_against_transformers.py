"""Both tools on a real Megatron checkpoint, split over processes, against transformers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_long.data.indexed import IndexedDatasetReader
from megatron_long.data.tokenizers import load_tokenizer
from megatron_long.evaluation.loss_report import read_loss_report
from megatron_long.evaluation.needle import NeedleTask, build_cases
from megatron_long.evaluation.needle_report import read_needle_report

from .fakes import make_story

pytestmark = pytest.mark.slow
LENGTH = 96
TOLERANCE_NATS = 1e-4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    """A Llama of random weights with the vocabulary of the tiny dataset."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama") / "hf"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=load_tokenizer(tiny_dataset / "tokenizer").vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copytree(tiny_dataset / "tokenizer", folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def checkpoint(llama: Path, run_job) -> Path:
    """The same model as a Megatron checkpoint."""
    output = llama.parent / "megatron"
    convert = ["tools/convert_checkpoint.py", "hf-to-megatron", "--input", llama]
    run_job(1, [*convert, "--output", output])
    return output


def token_losses(llama: Path, tokens: np.ndarray) -> np.ndarray:
    """Give the loss of predicting each token but the first, by transformers."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        logits = model(ids[None, :-1]).logits[0]
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").numpy()


def test_loss_by_position(llama, checkpoint, tiny_dataset, run_job, tmp_path):
    output = tmp_path / "loss.json"
    command = ["tools/evaluate_loss.py", "--checkpoint", checkpoint, "--dataset", tiny_dataset]
    command += ["--context-length", LENGTH, "--buckets", "0-20,20-96", "--output", output]
    command += ["--micro-batch-size", 2, "--tensor-model-parallel-size", 2]
    result = run_job(4, command)
    report = read_loss_report(output)
    for source in ("Book", "GitHub"):
        reader = IndexedDatasetReader(tiny_dataset / "valid" / source)
        losses = [token_losses(llama, reader.read(i)[: LENGTH + 1]) for i in range(len(reader))]
        for start, stop in ((0, 20), (20, 96)):
            expected = np.concatenate([part[start:stop] for part in losses])
            assert report.loss.num_tokens(start, stop, source) == len(expected)
            difference = report.loss.mean(start, stop, source) - expected.mean(dtype=np.float64)
            assert abs(difference) < TOLERANCE_NATS
    assert result.stdout.count("Loss in nats per token") == 1  # one rank prints


def test_needle(llama, checkpoint, run_job, tmp_path):
    story = tmp_path / "story.txt"
    story.write_text(make_story(200))
    output, lengths = tmp_path / "needle", (500, 700)
    command = ["tools/evaluate_needle.py", "--checkpoint", checkpoint, "--haystack", story]
    command += ["--context-lengths", *lengths, "--num-depths", 3, "--output-dir", output]
    run_job(2, [*command, "--context-parallel-size", 2])
    report = read_needle_report(output / "needle.json")
    tokenizer = load_tokenizer(checkpoint / "tokenizer")
    cases = build_cases(story.read_text(), tokenizer, NeedleTask(), lengths, report.settings.depths)
    assert len(report.results) == len(cases) == 6
    for case, result in zip(cases, report.results, strict=True):
        losses = token_losses(llama, case.row().tokens)[-case.num_answer_tokens :]
        assert abs(result.log_likelihood + losses.mean()) < TOLERANCE_NATS
        assert not result.is_exact  # random weights
    assert len({result.log_likelihood for result in report.results}) == 6
    assert json.loads((output / "needle.json").read_text())["settings"]["iteration"] == "release"
