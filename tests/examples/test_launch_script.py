"""examples/pretrain_llama_128k.sh prints a command that the real parser takes, alone and under SLURM."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_long.training import host_backend
from megatron_long.training.backend import GPU

host_backend.install()

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "pretrain_llama_128k.sh"


def dry_run(*argv: str, **variables: object) -> list[str]:
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "NPROC_PER_NODE": "8"}
    environment |= {name: str(value) for name, value in variables.items()}
    result = subprocess.run(
        ["bash", SCRIPT, *argv], env=environment, capture_output=True, text=True, check=True
    )
    return shlex.split(result.stdout)


@pytest.fixture
def paths(tmp_path: Path, tiny_dataset: Path) -> dict[str, Path]:
    checkpoint = tmp_path / "check point"  # the space must survive quoting
    checkpoint.mkdir()
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("release")
    return {"CHECKPOINT": checkpoint, "DATASET": tiny_dataset, "OUTPUT": tmp_path / "out"}


def training_flags(command: list[str]) -> list[str]:
    return command[command.index("megatron_long.pretrain") + 1 :]


@pytest.mark.parametrize(
    "recipe", ["llama3_8b_128k", "llama2_7b_80k", "llama2_7b_128k", "llama2_13b_64k"]
)
def test_printed_command_parses(recipe, paths):
    from megatron_long.pretrain import parse

    command = dry_run("--train-iters", "7", "--allow-repeat", RECIPE=recipe, **paths)
    assert command[:5] == ["python3", "-m", "megatron_long.launch", "--nproc-per-node", "8"]
    ours, args = parse(training_flags(command), GPU, 8)
    assert ours.recipe == recipe
    assert args.pretrained_checkpoint == str(paths["CHECKPOINT"])
    assert args.load == args.save == str(paths["OUTPUT"])
    assert args.train_iters == 7
    assert args.lr == 2e-5
    if recipe.endswith("128k"):
        assert args.seq_length == 131_072
        assert args.global_batch_size * args.seq_length == 4_194_304


def test_slurm_starts_one_launcher_a_node(paths):
    slurm = {"SLURM_JOB_ID": 77, "SLURM_NNODES": 4, "SLURM_GPUS_ON_NODE": 8}
    command = dry_run(HEAD_NODE="node-a", **slurm, **paths)
    text = " ".join(command)
    assert command[0] == "srun"
    assert "--nnodes 4" in text
    assert "--rdzv-endpoint node-a:20077" in text
    assert "--ntasks-per-node 1" in text


def test_missing_variable_is_named(paths):
    del paths["DATASET"]
    with pytest.raises(subprocess.CalledProcessError) as refused:
        dry_run(**paths)
    assert "set DATASET to the folder" in refused.value.stderr
