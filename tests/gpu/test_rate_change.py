"""A resumed run takes another constant rate on GPUs: Transformer Engine's optimizer, distributed, FP8 too.

Without CUDA (`REHEARSE=1`) the same runs take the host backend, and show that flags and comparison are right.
"""

import json
import os
from pathlib import Path

import pytest
import torch

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
REHEARSE = bool(os.environ.get("REHEARSE")) and NUM_GPUS == 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(NUM_GPUS < 2 and not REHEARSE, reason="needs two CUDA devices"),
]
FLAGS = (
    "--recipe tiny_debug --hidden-size 256 --ffn-hidden-size 768 --kv-channels 64 --padded-vocab-size 512 "
    "--seq-length 512 --max-position-embeddings 512 --global-batch-size 4 --allow-repeat "
    "--use-distributed-optimizer --train-iters 6"
).split()
BEFORE, NOW = ("--lr", "1e-3"), ("--lr", "1e-4")
FP8 = ("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "--fp8-param-gather")


@pytest.mark.parametrize("precision", [(), FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("layout", [(), ("--tensor-model-parallel-size", "2")], ids=["dp2", "tp2"])
def test_the_rate_can_be_changed_on_resume(precision, layout, run_job, tiny_dataset, tmp_path):
    if precision and REHEARSE:
        pytest.skip("FP8 needs a GPU")
    start, changed, log = tmp_path / "start", tmp_path / "changed", tmp_path / "loss.jsonl"
    command = [
        "-m",
        "megatron_long.pretrain",
        *FLAGS,
        *precision,
        *layout,
        "--dataset",
        tiny_dataset,
    ]
    run_job(2, [*command, *BEFORE, "--save", start, "--exit-interval", 2])

    refused = run_job(2, [*command, *NOW, "--load", start], check=False)
    told = " ".join((refused.stdout + refused.stderr).split())
    assert refused.returncode != 0
    assert "--lr was 0.001, and now it is 0.0001; give --override-opt-param-scheduler" in told

    save = ["--save", changed, "--exit-interval", 4, "--loss-log", log]
    first = run_job(2, [*command, *NOW, "--load", start, *save, "--override-opt-param-scheduler"])
    again = run_job(2, [*command, *NOW, "--load", changed, "--loss-log", log])
    for job in (first, again):
        assert "learning rate: 1.000000E-04" in job.stdout
        assert "learning rate: 1.000000E-03" not in job.stdout
    kept = run_job(
        2, [*command, *NOW, "--load", start, "--use-checkpoint-opt-param-scheduler"]
    ).stdout
    assert "learning rate: 1.000000E-03" in kept
    assert "learning rate: 1.000000E-04" not in kept
    steps = [json.loads(line)["iteration"] for line in Path(log).read_text().splitlines()]
    assert steps == [3, 4, 5, 6]
