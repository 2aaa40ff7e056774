"""Training and evaluation run nothing that lies in a checkpoint: by Megatron's own loader, in whole jobs."""

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_long.engine import megatron_adapter
from megatron_long.errors import DataError
from tests import hostile
from tests.job_fixtures import FLAGS

NEWEST = "iter_0000004"
RNG = "rng_state/shard_0.0_1.1"
COMMON = "common_state/shard_0_1"
EXTRA = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"
MODEL = "decoder.final_layernorm.weight"


@pytest.fixture(scope="module")
def run(jobs, tmp_path_factory) -> Path:
    """A run with a checkpoint at step 4 and no hashes, as of another program."""
    folder = tmp_path_factory.mktemp("run") / "ckpt"
    jobs.run(1, "--train-iters", 6, "--exit-interval", 4, "--save", folder)
    for path in folder.rglob("hashes.json"):
        path.unlink()
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy to be made hostile."""
    return Path(shutil.copytree(run, tmp_path / "ckpt"))


@pytest.fixture
def old_format(tmp_path) -> Path:
    """The file of a checkpoint in Megatron's old format, of another program."""
    file = tmp_path / "old" / "iter_0000004" / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    (tmp_path / "old" / "latest_checkpointed_iteration.txt").write_text("4")
    return file


def load_old_format(folder: Path) -> Any:
    """As training and evaluation do, by Megatron's own loader."""
    from megatron.training import checkpointing

    flags = {"non_persistent_global_ckpt_dir": None, "non_persistent_ckpt_type": None}
    with megatron_adapter.refused_pickles_named(str(folder)):
        return checkpointing._load_base_checkpoint(str(folder), Namespace(**flags), rank0=True)


@pytest.mark.parametrize("form", hostile.FORMS)
def test_the_old_format_runs_nothing(form, old_format, guarded, tmp_path):
    """Nor does the job end with status 0, as Megatron's would."""
    old_format.write_bytes(form(tmp_path / "marker"))
    with pytest.raises(DataError, match=r"cannot be read .*--load|--load .* cannot be read"):
        load_old_format(tmp_path / "old")
    assert not (tmp_path / "marker").exists()


def test_the_old_format_is_read(old_format, guarded, tmp_path):
    torch.save({"iteration": 4, "args": Namespace(a=1)}, old_format)
    assert load_old_format(tmp_path / "old")[0]["iteration"] == 4
    old_format.write_bytes(old_format.read_bytes()[:300])
    with pytest.raises(DataError, match="damaged"):
        load_old_format(tmp_path / "old")
    old_format.unlink()
    with pytest.raises(DataError, match="damaged"):
        load_old_format(tmp_path / "old")


PLANTED = [
    (".metadata", hostile.raw),
    ("common.pt", hostile.raw),
    ("common.pt", hostile.saved),
    ("common.pt", hostile.saved_before_torch_1_6),
    (RNG, hostile.saved),
    (RNG, hostile.saved_before_torch_1_6),
    (COMMON, hostile.saved),
    (COMMON, hostile.saved_before_torch_1_6),
    (EXTRA, hostile.saved),
    (MODEL, hostile.saved),
]


def plant(folder: Path, where: str, content: bytes) -> None:
    """In the newest checkpoint: in a file, or in an object or tensor of its shards."""
    if where in (".metadata", "common.pt"):
        (folder / NEWEST / where).write_bytes(content)
    else:
        hostile.plant_object(folder / NEWEST, where, content)


def refusal(where: str) -> str:
    if where == ".metadata":
        return f"{NEWEST}/.metadata cannot be read (UnpicklingError: it names posix.system, which is not"
    return "cannot be read as tensors and plain values only"


@pytest.mark.slow
@pytest.mark.parametrize(("where", "form"), PLANTED)
def test_training_runs_nothing(where, form, copy, jobs, tmp_path):
    marker = tmp_path / "marker"
    plant(copy, where, form(marker))
    jobs.start(1, "--train-iters", 6, "--load", copy, "--ckpt-assume-constant-structure")
    job = jobs.wait()
    assert not marker.exists()
    assert job.statuses == [2], job.text[-2000:]
    assert refusal(where) in " ".join(job.text.split())


@pytest.mark.slow
def test_the_checkpoint_itself_is_read(copy, jobs):
    """So that what is refused above is what was planted."""
    jobs.run(1, "--train-iters", 6, "--load", copy)
    jobs.run(1, "--train-iters", 6, "--load", copy, "--ckpt-assume-constant-structure")


@pytest.mark.slow
@pytest.mark.parametrize(("where", "form"), [PLANTED[0], PLANTED[3]])
def test_evaluation_runs_nothing(where, form, copy, tiny_dataset, run_job, tmp_path):
    marker = tmp_path / "marker"
    plant(copy, where, form(marker))
    command = ["tools/evaluate_loss.py", "--checkpoint", copy, "--dataset", tiny_dataset]
    command += ["--context-length", 128, "--max-documents-per-source", 1]
    result = run_job(1, [*command, "--output", tmp_path / "loss.json"], check=False)
    assert not marker.exists()
    assert result.returncode == 2
    assert refusal(where) in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "loss.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("where", "form"), PLANTED[:1])
def test_a_layout_check_runs_nothing(where, form, copy, tiny_dataset, run_job, tmp_path):
    marker = tmp_path / "marker"
    plant(copy, where, form(marker))
    flags = ["--dataset", tiny_dataset, "--load", copy, "--train-iters", 6]
    run_job(1, ["tools/check_layout.py", "--world-size", 1, *FLAGS, *flags], check=False)
    assert not marker.exists()
