"""A resumed run keeps the model that it trained; a start that is refused leaves its files as they are."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_long import pretrain
from megatron_long.engine.callback import Step
from megatron_long.errors import ConfigError
from megatron_long.model.geometry import geometry_from_args, geometry_from_hf
from megatron_long.training.callbacks.first_sidecars import WriteSidecars
from megatron_long.training.start import Start
from tests.job_fixtures import FLAGS

BASE = 50_000


@pytest.fixture(scope="module")
def run(jobs, tmp_path_factory) -> Path:
    """A checkpoint at step 2 of 4, with another RoPE base than the recipe's."""
    folder = tmp_path_factory.mktemp("run") / "ckpt"
    jobs.run(1, "--train-iters", 4, "--exit-interval", 2, "--save", folder, "--rotary-base", BASE)
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy to resume in."""
    return shutil.copytree(run, tmp_path / "ckpt")


def prepare(run: Path, dataset: Path, *flags: object):
    argv = [*FLAGS, "--dataset", dataset, "--train-iters", 4, "--load", run, *flags]
    return pretrain.prepare([str(word) for word in argv])[1]


def sidecars(folder: Path) -> dict[str, bytes]:
    """The files next to the checkpoints."""
    paths = [path for path in folder.iterdir() if path.is_file() and path.name != ".save_lock"]
    return {path.name: path.read_bytes() for path in paths}


def test_the_base_that_was_trained_stays(run, tiny_dataset):
    assert prepare(run, tiny_dataset).rotary_base == BASE
    assert prepare(run, tiny_dataset, "--rotary-base", BASE).rotary_base == BASE
    assert prepare(run, tiny_dataset, "--rope-method", "base").rotary_base == BASE
    assert prepare(run, tiny_dataset, "--finetune").rotary_base != BASE


def test_a_model_named_beside_it_brings_no_rope_of_its_own(run, tiny_dataset, tmp_path):
    config = json.loads((run / "hf_config.json").read_text())
    config.pop("rope_theta")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert prepare(run, tiny_dataset, "--hf-config", tmp_path).rotary_base == BASE


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rotary-base", 10_000], "RoPE base: 50,000 before, 10,000 now"),
        (
            ["--rope-method", "linear", "--rope-factor", 2],
            'RoPE method: {"rope_type": "default"} before, {"factor": 2.0, "rope_type": "linear"} now',
        ),
        (["--num-layers", 4], "--num-layers: 2 before, 4 now"),
        (["--untie-embeddings-and-output-weights"], "tied embeddings: true before, false now"),
    ],
)
def test_another_model_is_refused(flags, words, run, tiny_dataset):
    with pytest.raises(ConfigError) as refused:
        prepare(run, tiny_dataset, *flags)
    message = str(refused.value)
    assert f"the model in --load {run} was trained with other flags ({words})" in message
    assert "--finetune" in message
    prepare(run, tiny_dataset, *flags, "--finetune")


@pytest.mark.parametrize("method", ["linear", "yarn", "llama3"])
@pytest.mark.parametrize("factor", [2, 3, 7, 20])
def test_a_scaled_rope_is_the_same_when_it_is_read_back(method, factor, copy, tiny_dataset):
    """Without the flags, and with them again."""
    flags = ("--rope-method", method, "--rope-factor", factor, "--rope-original-length", 64)
    config = geometry_from_args(prepare(copy, tiny_dataset, "--finetune", *flags)).to_hf_config()
    (copy / "hf_config.json").write_text(json.dumps(config))
    (copy / "hashes.json").unlink()
    expected = geometry_from_hf(copy / "hf_config.json")
    for again in ((), flags):
        seen = geometry_from_args(prepare(copy, tiny_dataset, *again))
        assert (seen.rope, seen.rotary_base) == (expected.rope, expected.rotary_base)


def test_going_on_trains_and_keeps_that_base(copy, jobs):
    jobs.run(1, "--train-iters", 4, "--load", copy, "--save", copy)
    assert geometry_from_hf(copy / "hf_config.json").rotary_base == BASE
    assert (copy / "latest_checkpointed_iteration.txt").read_text() == "4"


def test_a_start_that_megatron_refuses_leaves_the_files_as_they_are(copy, jobs):
    before = sidecars(copy)
    assert {"hf_config.json", "run.json", "hashes.json"} <= before.keys()
    flags = ("--train-iters", 9, "--load", copy, "--save", copy)
    job = jobs.run(1, *flags, status=2)
    assert "was trained on another schedule" in " ".join(job.text.split())
    assert sidecars(copy) == before


def test_a_checkpoint_without_an_optimizer_needs_the_flag(jobs, tmp_path):
    flags = ("--train-iters", 4, "--save", tmp_path)
    jobs.run(1, *flags, "--exit-interval", 2, "--no-save-optim")
    job = jobs.run(1, *flags, "--load", tmp_path, status=2)
    text = " ".join(job.text.split())
    assert "holds no optimizer state, as after --no-save-optim; give --no-load-optim" in text
    assert "Traceback" not in text
    jobs.run(1, *flags, "--load", tmp_path, "--no-load-optim", "--override-opt-param-scheduler")
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "4"


def test_a_folder_that_cannot_be_written_to_is_refused_early(jobs, tmp_path):
    (tmp_path / "file").touch()
    job = jobs.run(2, "--train-iters", 1, "--save", tmp_path / "file" / "ckpt", status=2)
    assert "cannot be written to" in " ".join(job.text.split())


class TwoProcesses:
    """A job whose other process met this."""

    rank = 0

    def __init__(self, other: str | None) -> None:
        self.other = other

    def any(self, flag: bool) -> bool:
        return flag or self.other is not None

    def gather(self, item: Any) -> list[Any]:
        return [item, self.other]


def fail(_: Path) -> None:
    raise OSError("No space left on device")


@pytest.mark.parametrize(("write", "other"), [(fail, None), (lambda _: None, "No space left")])
def test_what_cannot_be_written_before_the_first_step_ends_every_rank(
    write, other, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    start, step = Start(None, False, {}, None, {}), Step(0, [], None)
    with pytest.raises(ConfigError, match=r"--save out cannot be written to \(No space left"):
        WriteSidecars(TwoProcesses(other), Path("out"), start, write).before_training(step)
    WriteSidecars(TwoProcesses(None), Path("out"), start, lambda _: None).before_training(step)
