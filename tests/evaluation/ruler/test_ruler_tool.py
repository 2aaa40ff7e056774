"""The command on a small model: shards against transformers, row by row; resuming; the report."""

import json
from pathlib import Path

import pytest
import torch

from megatron_long.evaluation.ruler.ruler_report import read_ruler_report

from .ruler_files import VOCAB_SIZE, save_tokenizer, write_inputs

pytestmark = pytest.mark.slow
TASKS = ("niah_single_1", "vt", "fwe", "qa_1")
TOOL = "tools/evaluate_ruler.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_job) -> Path:
    """A Llama of random weights, as a Hugging Face folder and as a Megatron checkpoint."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("ruler")
    save_tokenizer(folder / "hf")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.15,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    convert = ["tools/convert_checkpoint.py", "hf-to-megatron", "--input", folder / "hf"]
    run_job(1, [*convert, "--output", folder / "megatron"])
    return folder


def read_rows(folder: Path) -> dict:
    lines = (folder / "samples.jsonl").read_text().splitlines()[1:]
    rows = [json.loads(line) for line in lines]
    return {(row["task"], row["context_length"], row["index"]): row for row in rows}


def test_shards_say_what_transformers_says(folder, run_job, tmp_path):
    squad, lengths = write_inputs(tmp_path).squad, [1536, 2048]
    asked = ["--tasks", *TASKS, "--context-lengths", *lengths, "--num-samples", 3, "--squad", squad]
    theirs = [TOOL, "--checkpoint", folder / "hf", "--backend", "hf", *asked]
    run_job(1, [*theirs, "--output-dir", tmp_path / "hf"])
    ours = [TOOL, "--checkpoint", folder / "megatron", *asked, "--output-dir", tmp_path / "ours"]
    layout = ["--context-parallel-size", 2, "--pipeline-model-parallel-size", 2]
    printed = run_job(4, [*ours, *layout, "--micro-batch-size", 2]).stdout
    rows = read_rows(tmp_path / "ours")
    assert len(rows) == len(TASKS) * len(lengths) * 3
    assert rows == read_rows(tmp_path / "hf")
    assert len({row["prediction"] for row in rows.values()}) > len(rows) // 2
    assert "no effective length: it takes all 13 tasks, here are 4" in printed
    report = read_ruler_report(tmp_path / "ours" / "ruler.json")
    assert report.is_complete
    log = tmp_path / "ours" / "samples.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[: 1 + len(rows) // 2]))
    again = run_job(2, ours).stdout  # by two replicas
    assert f"{len(rows) // 2} of {len(rows)} samples are done" in again
    assert read_rows(tmp_path / "ours") == rows
    assert read_ruler_report(tmp_path / "ours" / "ruler.json") == report
    other = run_job(1, [*ours, "--num-samples", 2], check=False)
    assert "num_samples 3 there, 2 here" in " ".join(other.stderr.split())
    page = run_job(1, ["tools/report.py", tmp_path, "--output", tmp_path / "page.html"])
    assert "2 RULER reports" in page.stdout
    text = (tmp_path / "page.html").read_text()
    assert "RULER by task" in text
    assert str(report.estimates["vt", 1536]) in text
