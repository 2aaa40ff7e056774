"""The resources that a run needs against those of a machine: told before training, with figures and a fit."""

import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from megatron_long import machine
from megatron_long.engine import host_backend
from megatron_long.errors import ConfigError
from megatron_long.flags.backend import GPU, HOST
from megatron_long.machine import Room
from megatron_long.planning import preflight
from megatron_long.planning.hardware import GPUS
from tests.checkpoint.test_saving import NAMESPACE, can_mount
from tests.fake_checkpoints import write_fake_checkpoint
from tests.launched import REPOSITORY

host_backend.install()

H100, CHECKPOINT = GPUS["h100"], 112.4e9
MOCK = ("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "128255")


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """Warnings for llama3_8b_128k with flags on a machine: `ask("--keep-last", 2, free=1e12, host=1e12)`."""
    from megatron_long.command_line import parse

    usage = namedtuple("usage", "total used free")

    def warnings(
        *flags: object, free: float = 1e15, host: float = 1e15, ranks: int = 8, gpu=H100
    ) -> str:
        def disk_usage(path: Path):
            if not path.exists():
                raise FileNotFoundError(path)
            return usage(0, 0, free)

        monkeypatch.setattr(machine.shutil, "disk_usage", disk_usage)
        monkeypatch.setattr(preflight, "host_memory", lambda: Room(host, "the job's memory.max"))
        argv = ["--recipe", "llama3_8b_128k", *MOCK, "--save", tmp_path / "ckpt", *flags]
        args = parse([str(word) for word in argv], GPU if gpu else HOST, ranks)[1]
        return "\n".join(preflight.check_machine(args, ranks, gpu))

    return warnings


def test_recipe_on_its_machine_has_no_warning(ask):
    assert ask() == ""


def test_model_that_a_gpu_cannot_hold_is_refused_with_what_fits(ask):
    cut = ("--tensor-model-parallel-size", 1, "--context-parallel-size", 1)
    with pytest.raises(ConfigError) as refused:
        ask(*cut, ranks=1)
    text = str(refused.value)
    assert "8.0B parameters" in text
    assert "take 135 GiB of each GPU, which has 79" in text
    assert "no layout fits: the smallest takes" in text
    cut = ("--tensor-model-parallel-size", 2, "--context-parallel-size", 4)
    with pytest.raises(ConfigError) as refused:
        ask("--recipe", "llama3_70b_128k", *cut, "--pipeline-model-parallel-size", 1, ranks=64)
    assert "70.6B parameters" in str(refused.value)
    assert "this fits, 69 GiB: --tensor-model-parallel-size 8" in str(refused.value)


def test_peak_beyond_the_gpu_is_a_warning_with_what_fits(ask):
    text = ask("--tensor-model-parallel-size", 1, "--context-parallel-size", 8)
    assert "87 GiB at the peak of a step are predicted, and 75 of 79 can be used" in text
    assert "this fits, 65 GiB: --tensor-model-parallel-size 2" in text
    assert "--recompute-modules layernorm mlp" in text
    assert (
        ask("--tensor-model-parallel-size", 1, "--context-parallel-size", 8, gpu=GPUS["h200"]) == ""
    )
    # Twice the tokens at once take as much as twice the window.
    assert "GiB at the peak of a step" in ask("--micro-batch-size", 2)


def test_state_that_is_not_counted_is_not_judged(ask):
    cut = ("--tensor-model-parallel-size", 1, "--context-parallel-size", 8)
    assert ask(*cut, "--grad-reduce-in-bf16") == ""


def test_disk_without_room_for_one_checkpoint_is_refused(ask, tmp_path):
    with pytest.raises(ConfigError) as refused:
        ask(free=CHECKPOINT - 1e9)
    text = str(refused.value)
    assert f"--save {tmp_path / 'ckpt'} has no room" in text
    assert "8.03B parameters with its optimizer takes 112 GB, and 111 GB are free" in text
    assert "free 1.0 GB" in text
    assert "--no-save-optim (weights alone, 16 GB)" in text
    with pytest.raises(ConfigError) as refused:
        ask(free=15e9)
    assert "--no-save-optim" not in str(refused.value)
    assert ask("--no-save-optim", free=40e9) == ""


@pytest.mark.parametrize(
    ("flags", "present", "free", "words"),
    [
        ((), 0, 2.1 * CHECKPOINT, ""),
        (
            (),
            0,
            1.9 * CHECKPOINT,
            "has room for 1 of the 2 checkpoints that will exist at",
        ),
        ((), 1, 1.1 * CHECKPOINT, ""),
        (("--keep-last", 3), 0, 3.9 * CHECKPOINT, "has room for 3 of the 4 checkpoints"),
        (("--keep-last", 3), 2, 2.1 * CHECKPOINT, ""),
        (("--keep-last", 3), 2, 1.9 * CHECKPOINT, "has room for 1 of the 2 checkpoints"),
        (("--keep-last", 3), 7, 1.1 * CHECKPOINT, ""),
    ],
)
def test_checkpoints_that_lie_there_at_once(flags, present, free, words, ask, tmp_path):
    for step in range(present):
        write_fake_checkpoint(tmp_path / "ckpt", step)
    text = ask(*flags, free=free)
    assert words in text
    assert bool(words) is bool(text)


def test_what_a_killed_save_left_counts_as_free(ask, tmp_path):
    leftover = tmp_path / "ckpt" / ".iter_0000012.partial"
    leftover.mkdir(parents=True)
    with (leftover / "__0_0.distcp").open("wb") as file:
        file.truncate(2_000_000_000)
    assert "has room for 1 of the 2" in ask(free=CHECKPOINT - 1e9)


def test_host_memory_of_a_save_is_a_warning(ask, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert ask(host=64e9) == ""  # training waits, and one tensor at a time is copied
    text = ask("--async-save", host=64e9)
    assert (
        "with --async-save each save copies 112 GB to the host memory of a node (8 of 8 ranks)"
        in text
    )
    assert "64 GB are available here (the job's memory.max)" in text
    assert "2 times as many nodes" in text
    assert ask("--async-save", host=64e9, ranks=16) == ""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert ask("--async-save", host=64e9) == ""


def test_the_host_backend_is_compared_too(ask):
    with pytest.raises(ConfigError, match="takes 96 GB, and 90 GB are free"):
        ask(gpu=None, free=90e9)  # 12 bytes a parameter in float32


def test_model_without_a_shape_is_left_to_megatron():
    from megatron_long.engine.megatron_adapter import parse_flags

    args = parse_flags(["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"])
    assert preflight.needs_of(args, 1) is None


@pytest.mark.slow
def test_training_is_refused_before_it_starts(tiny_dataset, tmp_path):
    """Two processes, a file system of 1 MB, a model of 4 MB: status 2 and nothing written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not can_mount():
        pytest.skip("no right to mount a small file system")
    command = ["-m", "megatron_long.pretrain", "--recipe", "tiny_debug", "--dataset", tiny_dataset]
    command += ["--allow-repeat", "--save", disk / "ckpt"]
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    script = (
        'mount -t tmpfs -o size=1m none "$1" && shift && "$@"; status=$?; ls "$DISK"; exit $status'
    )
    words = [*NAMESPACE, "bash", "-c", script, "bash", disk, sys.executable, *launch, *command]
    result = subprocess.run(
        [str(word) for word in words],
        cwd=REPOSITORY,
        env={**os.environ, "DISK": str(disk), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1  # torchrun's own; that of the ranks is 2
    text = " ".join(result.stderr.split())
    assert "exitcode : 2" in text
    assert "has no room: a checkpoint of" in text
    assert "ckpt" not in result.stdout.split()
