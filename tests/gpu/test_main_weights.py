"""FP8 parameters: starts from weights alone and evaluation take unrounded ones; other optimizers resume."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_long.checkpoint.megatron_folder import MAIN_PREFIXES
from megatron_long.checkpoint.torch_dist import TorchDistReader
from megatron_long.evaluation.loss.loss_report import read_loss_report

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
FP8 = "--fp8-format hybrid --fp8-recipe tensorwise --fp8-param-gather".split()
STILL = "--lr 0 --min-lr 0 --weight-decay 0 --train-iters 1".split()
"""A step that changes nothing: what is saved is what was loaded."""
ONE = "--tensor-model-parallel-size 1 --context-parallel-size 1".split()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS == 0, reason="no CUDA device"),
]


def start(run_job: Callable, dataset: Path, model: Path, save: Path, ranks: int, *flags) -> Path:
    """Start from weights alone with FP8 parameters and save them untrained; gives the checkpoint."""
    command = ["-m", "megatron_long.pretrain", "--recipe", "tiny_debug", "--seq-length", "512"]
    command += ["--dataset", dataset, "--allow-repeat", "--global-batch-size", "4", *STILL, *FP8]
    command += [
        *ONE,
        "--load",
        model,
        "--finetune",
        "--save",
        save,
        "--rotary-base",
        "10000",
        *flags,
    ]
    run_job(ranks, command)
    return save / "iter_0000001"


@pytest.fixture(scope="module")
def fp8_run(run_job, tiny_dataset, megatron_model, tmp_path_factory) -> Path:
    """Checkpoint folder of a run with FP8 parameters from the converted model, nothing changed."""
    folder = tmp_path_factory.mktemp("fp8") / "run"
    start(run_job, tiny_dataset, megatron_model, folder, 1)
    return folder


def same_main_copy(iteration: Path, model: Path) -> None:
    """The main copy is the model's weights bit by bit, and FP8 has rounded those next to it."""
    source, main = TorchDistReader(model), TorchDistReader(iteration, prefix=MAIN_PREFIXES[0])
    rounded = TorchDistReader(iteration)
    assert set(main.shapes()) <= set(source.shapes())
    for key in main.shapes():
        assert torch.equal(main.read(key, None), source.read(key, None).float()), key
    key = "decoder.layers.mlp.linear_fc2.weight"
    exact, seen = source.read(key, None).float(), rounded.read(key, None).float()
    error = float((exact - seen).norm() / exact.norm())
    print(f"FP8 has rounded {key} by {error:.2%} RMS")
    assert 0.01 < error < 0.05


def test_the_main_copy_is_the_converted_checkpoint(fp8_run, megatron_model):
    same_main_copy(fp8_run / "iter_0000001", megatron_model / "release")


@pytest.mark.multi_gpu
@pytest.mark.skipif(NUM_GPUS < 2, reason="one CUDA device")
@pytest.mark.parametrize("flags", [(), ("--tensor-model-parallel-size", "2")], ids=["dp2", "tp2"])
def test_each_rank_takes_its_part(flags, run_job, tiny_dataset, megatron_model, tmp_path):
    found = start(run_job, tiny_dataset, megatron_model, tmp_path / "run", 2, *flags)
    same_main_copy(found, megatron_model / "release")


def test_the_next_run_starts_from_the_main_copy(
    fp8_run, run_job, tiny_dataset, megatron_model, tmp_path
):
    found = start(run_job, tiny_dataset, fp8_run, tmp_path / "next", 1)
    same_main_copy(found, megatron_model / "release")


@pytest.fixture(scope="module")
def loss(run_job, tiny_dataset, tmp_path_factory) -> Callable[..., float]:
    """Mean loss of the held-out documents by `tools/evaluate_loss.py`."""
    folder = tmp_path_factory.mktemp("loss")

    def measure(model: Path, *flags: str) -> float:
        output = folder / f"{'-'.join((model.name, *flags))}.json"
        if not output.exists():
            command = ["tools/evaluate_loss.py", "--dataset", tiny_dataset, "--output", output]
            run_job(1, [*command, "--context-length", "512", "--checkpoint", model, *flags])
        return float(read_loss_report(output).loss.mean(0, 512))

    return measure


def test_evaluation_takes_the_main_copy(loss, fp8_run, megatron_model):
    assert loss(fp8_run) == loss(megatron_model)


def test_evaluation_of_the_rounded_weights_is_asked_for(loss, fp8_run):
    assert loss(fp8_run, "--weights", "model") != loss(fp8_run)


OFFLOAD = (
    "--use-distributed-optimizer --use-precision-aware-optimizer --optimizer-cpu-offload "
    "--optimizer-offload-fraction"
).split()
WITHOUT = ["tests/gpu/without_transformer_engine.py"]
OPTIMIZERS = {
    "offloaded": (["-m", "megatron_long.pretrain"], (*OFFLOAD, "1.0")),
    "half-offloaded": (["-m", "megatron_long.pretrain"], (*OFFLOAD, "0.5")),
    "torch-adamw": (WITHOUT, ("--use-distributed-optimizer",)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_optimizers_save_and_resume(name, run_job, tiny_dataset, megatron_model, tmp_path):
    """The first save goes through, and the resumed run takes the steps of the uninterrupted one."""
    program, flags = OPTIMIZERS[name]
    command = [*program, "--recipe", "tiny_debug", "--seq-length", "512", "--dataset", tiny_dataset]
    command += ["--allow-repeat", "--global-batch-size", "4", "--train-iters", "4", *ONE, *flags]
    command += ["--pretrained-checkpoint", megatron_model, "--load", tmp_path / "run"]
    command += ["--lr", "1e-3"]
    logs = [tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"]
    saves = ["--save", tmp_path / "run", "--save-interval", "2"]
    run_job(1, [*command, *saves, "--loss-log", logs[0]])
    run_job(1, [*command, "--loss-log", logs[1], "--ckpt-step", "2"])
    whole, resumed = (
        [json.loads(line)["lm loss"] for line in p.read_text().splitlines()] for p in logs
    )
    assert len(whole) == 4
    assert resumed == pytest.approx(whole[2:], rel=1e-3)
    assert whole[3] != whole[2]
