"""Beginners' first commands that fail: each message names the way out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_long import command_line
from megatron_long.engine import host_backend
from megatron_long.errors import ConfigError
from megatron_long.evaluation.input_checks import find_checkpoint
from megatron_long.flags.backend import HOST
from megatron_long.flags.flag_help import UNITS
from megatron_long.flags.relations import PATH_FLAGS
from tests.fake_checkpoints import find_iteration

host_backend.install()
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "Llama-3"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture(params=["iter_0000003", "release"])
def one_checkpoint(request, tmp_path: Path) -> Path:
    """The folder of one checkpoint, where that of all is meant."""
    folder = tmp_path / "ckpt" / request.param
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text("{}")
    step = "release" if request.param == "release" else "3"
    (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").write_text(step)
    return folder


def refused(action) -> str:
    with pytest.raises(ConfigError) as error:
        action()
    return str(error.value)


def train(*argv: object) -> str:
    return refused(lambda: command_line.parse([*map(str, argv)], HOST, 1))


DATA = ("--recipe", "tiny_debug", "--mock-data")


def test_no_flag_at_all_names_the_ways_to_a_model():
    told = train()
    assert "no model: give --recipe (llama2_7b_80k" in told
    for flag in ("--hf-checkpoint", "--pretrained-checkpoint", "--hf-config", "--dataset"):
        assert flag in told
    assert "--normalization" not in told


def test_a_hugging_face_folder_is_told_from_a_checkpoint(hf_folder):
    for flag in ("--load", "--pretrained-checkpoint"):
        told = train(*DATA, flag, hf_folder)
        assert (
            f"{flag} {hf_folder} is a Hugging Face model folder; start from it with --hf-chec"
            in told
        )
    told = refused(lambda: find_checkpoint(hf_folder))
    assert told == f"--checkpoint {hf_folder} is a Hugging Face model folder; give --backend hf too"
    told = refused(lambda: find_iteration(hf_folder))
    assert f"--input {hf_folder} is a Hugging Face model folder; it can be used directly" in told


def test_one_checkpoint_is_told_from_the_folder_of_all(one_checkpoint):
    folder = one_checkpoint.parent
    step = "" if one_checkpoint.name == "release" else " 3"
    for flag in ("--load", "--pretrained-checkpoint"):
        told = train(*DATA, flag, one_checkpoint)
        assert told.endswith(f"give {flag} {folder}" + (f" --ckpt-step{step}" if step else ""))
    told = refused(lambda: find_checkpoint(one_checkpoint))
    assert told.endswith(f"give --checkpoint {folder}" + (f" --ckpt-step{step}" if step else ""))
    told = refused(lambda: find_iteration(one_checkpoint))
    assert told.endswith(f"give --input {folder}" + (f" --iteration{step}" if step else ""))


def test_what_is_nothing_of_all_this_names_who_makes_checkpoints(tmp_path):
    for action in (find_checkpoint, find_iteration):
        told = refused(lambda action=action: action(tmp_path))
        assert "holds no Megatron checkpoint: latest_checkpointed_iteration.txt is missing" in told
        assert "(--save) or tools/convert_checkpoint.py" in told
        assert "does not exist" in refused(lambda action=action: action(tmp_path / "nowhere"))


@pytest.mark.parametrize("joint", [" ", "="], ids=["two words", "one word"])
def test_paths_that_no_file_can_have_are_refused(joint, tmp_path):
    for flag in PATH_FLAGS:
        told = train(*DATA, *f"{flag}{joint}{tmp_path}/{'x' * 256}".split())
        assert told.startswith(f"{flag} {tmp_path}/xxx")
        assert "is too long" in told
        assert "is too long" in train(*DATA, *f"{flag}{joint}{tmp_path}{'/x' * 2048}".split())
    assert "14 for itself" in train(*DATA, "--export-hf", tmp_path / ("x" * 250))
    told = train(*DATA, "--save", os.fsdecode(bytes(tmp_path) + b"/x\xff"))
    assert told.startswith(
        f"'{tmp_path}/x\\udcff' on the command line has bytes that are not UTF-8"
    )


LENGTH_FLAGS = {
    "evaluate_loss.py": ("--context-length", "--training-length", "--min-document-tokens"),
    "evaluate_needle.py": (
        "--context-length",
        "--context-lengths",
        "--min-length",
        "--training-length",
    ),
    "evaluate_bookqa.py": ("--context-length",),
    "inspect_dataset.py": ("--seq-length",),
    "plan_run.py": ("--seq-length",),
    "preprocess_mix.py": ("--cut-length", "--long-threshold"),
    "convert_checkpoint.py hf-to-megatron": ("--context-length", "--rope-original-length"),
}


@pytest.mark.parametrize("tool", LENGTH_FLAGS)
def test_lengths_are_taken_as_128k(tool):
    """`0Q` is refused for what it is; a length that is taken leaves the next complaint to another flag."""
    command = [sys.executable, *f"{REPOSITORY}/tools/{tool}".split()]
    for flag in LENGTH_FLAGS[tool]:
        for value, is_taken in (("128K", True), ("64k", True), ("0Q", False)):
            result = subprocess.run([*command, flag, value], capture_output=True, text=True)
            assert result.returncode == 2
            assert ("is not a length of 1 token or more" not in result.stderr) is is_taken
            assert "invalid" not in result.stderr


def test_training_takes_lengths_as_128k():
    words = [*DATA, "--tokenizer-type", "NullTokenizer", "--vocab-size", "500"]
    words += ["--seq-length", "64K", "--max-position-embeddings", "128K", "--train-iters", "1"]
    words += ["--rope-method", "yarn", "--rope-original-length", "4K", "--needle-min-length", "2K"]
    ours, args = command_line.parse(words, HOST, 1)
    assert (args.seq_length, args.max_position_embeddings) == (65_536, 131_072)
    assert (ours.rope_original_length, args.needle_min_length) == (4096, 2048)


@pytest.mark.parametrize(
    "words", [["--help"], ["--recipe", "tiny_debug", "-h"]], ids=["long", "short"]
)
def test_help_is_printed(words, run_job):
    shown = run_job(1, ["-m", "megatron_long.pretrain", *words]).stdout
    assert "usage: python -m megatron_long.pretrain" in shown
    assert "--tensor-model-parallel-size" in shown


def test_help_shows_ours_first_with_units_and_defaults(capsys):
    with pytest.raises(SystemExit):
        command_line.parse(["--help"], HOST, 1)
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].startswith("usage: python -m megatron_long.pretrain")
    theirs = text.index("--tensor-model-parallel-size")
    for name, unit in UNITS.items():
        flag = f"--{name.replace('_', '-')} {unit}"
        assert 0 < text.index(flag) < theirs, flag
    assert len(text[:theirs].splitlines()) < 150
    words = " ".join(text[:theirs].split())
    for default in (
        "saving. 0 waits for ever. Default: 480.0.",
        "by default 30, or never",
        "Default: 10.",
    ):
        assert default in words
