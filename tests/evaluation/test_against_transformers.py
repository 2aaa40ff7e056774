"""Both tools on a real Megatron checkpoint, split over processes, against transformers."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_long.dataset.indexed import IndexedDatasetReader
from megatron_long.evaluation.loss.loss_report import read_loss_report
from megatron_long.evaluation.needle.needle_report import read_needle_report
from megatron_long.evaluation.needle.needle_tasks import TASK_NAMES
from megatron_long.tokenizer.loading import load_tokenizer

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


@pytest.fixture(scope="module")
def exported(checkpoint: Path, run_job) -> Path:
    """The checkpoint as a Hugging Face folder again."""
    output = checkpoint.parent / "export"
    convert = ["tools/convert_checkpoint.py", "megatron-to-hf", "--input", checkpoint]
    run_job(1, [*convert, "--output", output])
    return output


def test_needle_cell_by_cell(checkpoint, exported, run_job, tmp_path):
    """Every task, split over processes, against transformers on the exported model, which generates too."""
    pytest.importorskip("rouge_score", reason="an optional package: pip install rouge-score")
    story = tmp_path / "story.txt"
    story.write_text(make_story(200))
    grid = ["--haystack", story, "--context-lengths", 600, 700, "--num-depths", 3]
    grid += ["--tasks", *TASK_NAMES, "--num-seeds", 2]
    tool = "tools/evaluate_needle.py"
    layout = ["--context-parallel-size", 2]
    ours = [tool, "--checkpoint", checkpoint, *grid, "--output-dir", tmp_path / "ours", *layout]
    run_job(2, ours)
    theirs = [tool, "--checkpoint", exported, *grid, "--output-dir", tmp_path / "hf"]
    printed = run_job(1, [*theirs, "--backend", "hf"]).stdout
    seen = read_needle_report(tmp_path / "ours" / "needle.json").results
    expected = read_needle_report(tmp_path / "hf" / "needle.json").results
    assert len(seen) == len(expected) == 6 * 2 * 2 * 3
    pairs = list(zip(seen, expected, strict=True))
    largest = max(abs(cell.log_likelihood - other.log_likelihood) for cell, other in pairs)
    print(f"needle: largest difference of {len(pairs)} cells {largest:.1e} nats per token")
    for cell, other in pairs:
        assert cell.key == other.key
        assert abs(cell.log_likelihood - other.log_likelihood) < TOLERANCE_NATS
        assert (cell.is_exact, cell.token_accuracy) == (other.is_exact, other.token_accuracy)
        assert cell.generated is None
        assert other.generated
        assert 0 <= other.rouge1 <= 1
    assert len({cell.log_likelihood for cell in seen}) == len(seen)
    assert "ROUGE-1" in printed


def test_loss_by_source_and_position(llama, checkpoint, exported, tiny_dataset, run_job, tmp_path):
    """The whole curve, tensor-parallel replicas against transformers; transformers against itself."""
    tool = ["tools/evaluate_loss.py", "--dataset", tiny_dataset, "--context-length", LENGTH]
    tool += ["--buckets", "0-20,20-96"]
    theirs = [*tool, "--checkpoint", exported, "--backend", "hf"]
    run_job(1, [*theirs, "--output", tmp_path / "hf.json"], fresh=True)  # no host backend
    ours = [*tool, "--checkpoint", checkpoint, "--output", tmp_path / "ours.json"]
    layout = ["--tensor-model-parallel-size", 2, "--compare", tmp_path / "hf.json"]
    printed = run_job(4, [*ours, *layout, "--micro-batch-size", 2]).stdout
    seen, expected = (read_loss_report(tmp_path / f"{name}.json").loss for name in ("ours", "hf"))
    assert seen.edges == expected.edges
    largest = np.nanmax(np.abs(seen.curve() - expected.curve()))
    print(f"loss: largest difference of the curve {largest:.1e} nats")
    for source in ("Book", "GitHub", None):
        np.testing.assert_allclose(seen.curve(source), expected.curve(source), atol=TOLERANCE_NATS)
    assert printed.count("Loss in nats per token") == 1  # one rank prints
    assert "*" not in printed.partition("differences to it")[2].partition("* beyond")[0]
    for source in ("Book", "GitHub"):
        reader = IndexedDatasetReader(tiny_dataset / "valid" / source)
        losses = [token_losses(llama, reader.read(i)[: LENGTH + 1]) for i in range(len(reader))]
        for start, stop in ((0, 20), (20, 96)):
            by_hand = np.concatenate([part[start:stop] for part in losses])
            assert expected.num_tokens(start, stop, source) == len(by_hand)
            difference = expected.mean(start, stop, source) - by_hand.mean(dtype=np.float64)
            assert abs(difference) < TOLERANCE_NATS
