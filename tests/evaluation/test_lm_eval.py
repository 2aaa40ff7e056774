"""lm-evaluation-harness on an exported folder, as docs/evaluation.md says, with a task made here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .copying_model import save_copying_model

pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval", reason="an optional package: pip install lm-eval")

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {data}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{text}}}}"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - metric: acc
"""


def test_a_copying_model_chooses_what_it_has_seen(tmp_path: Path, run_job):
    """Through the checkpoint: converted, exported and scored, it is right wherever copying is right."""
    words = [f"w{number}" for number in range(40)]
    model = save_copying_model(tmp_path / "model", words)
    convert = ["tools/convert_checkpoint.py", "hf-to-megatron", "--input", model]
    run_job(1, [*convert, "--output", tmp_path / "ckpt"])
    export = ["tools/convert_checkpoint.py", "megatron-to-hf", "--input", tmp_path / "ckpt"]
    run_job(1, [*export, "--output", tmp_path / "export"])
    documents = [
        {
            "text": f"w0 {words[i]} {words[i + 1]} w38 w39 {words[i]}",
            "choices": [words[i + 1], words[i + 2]],
            "label": 0 if i < 15 else 1,  # the last five ask for what is not there
        }
        for i in range(1, 21)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_choice.yaml").write_text(TASK.format(data=data))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'export'},dtype=float32"]
    command += ["--tasks", "local_choice", "--include_path", tmp_path / "tasks"]
    command += ["--batch_size", "4", "--output_path", tmp_path / "results.json"]
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
    }
    result = subprocess.run(
        list(map(str, command)),
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    report = next(tmp_path.glob("results*.json"))
    accuracy = json.loads(report.read_text())["results"]["local_choice"]["acc,none"]
    assert accuracy == 14 / 20
