"""examples/speedrun.sh: each command is one that its parser takes, and the whole runs on a tiny model."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_long.engine import host_backend
from megatron_long.flags.backend import GPU
from tests.conftest import write_corpus, write_tiny_llama
from tests.fake_checkpoints import write_fake_checkpoint

host_backend.install()

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "speedrun.sh"
TOOLS = (
    "preprocess_mix",
    "convert_checkpoint",
    "evaluate_loss",
    "evaluate_loss",
    "evaluate_needle",
    "convert_checkpoint",
    "report",
)
"""The commands besides training, in their order."""
RECORDER = """#!{python}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(sys.argv) + "\\n")
"""


def run(folder: Path, *argv: str, **variables: object) -> subprocess.CompletedProcess[str]:
    environment = {name: str(value) for name, value in variables.items()}
    return subprocess.run(
        ["bash", SCRIPT, *argv],
        env=os.environ | environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def record(tmp_path):
    """Run the script with programs that write their arguments down and do nothing."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name in ("python", "python3", "torchrun"):
        (binaries / name).write_text(RECORDER.format(python=sys.executable))
        (binaries / name).chmod(0o755)

    def start(*argv: str, **variables: object) -> list[list[str]]:
        lines = tmp_path / "commands.jsonl"
        lines.unlink(missing_ok=True)
        given = {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "RECORD": lines,
            "WORK": tmp_path / "work folder",  # the space must survive quoting
            "MODEL": tmp_path / "model",
            "CORPUS": tmp_path / "corpus",
            "BOOK": tmp_path / "book.txt",
        }
        result = run(tmp_path, *argv, **given | variables)
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in lines.read_text().splitlines()]

    return start


def parser_of(tool: str):
    module = importlib.import_module(f"megatron_long.commands.{tool}")
    names = ("build_parser",)
    return next(getattr(module, name) for name in names if hasattr(module, name))()


def flags_after(command: list[str], program: str) -> list[str]:
    place = next(i for i, word in enumerate(command) if word.endswith(program))
    return command[place + 1 :]


@pytest.mark.parametrize(
    ("variables", "recipe", "length"),
    [
        ({}, "llama3_8b_128k", 131_072),
        ({"RECIPE": "llama2_7b_80k", "LENGTH": "80K"}, "llama2_7b_80k", 81_920),
    ],
)
def test_each_command_is_taken(variables, recipe, length, record, tiny_dataset):
    from megatron_long.command_line import parse
    from megatron_long.engine import megatron_adapter
    from megatron_long.evaluation.input_checks import check_context_length

    commands = record("--train-iters", "7", "--allow-repeat", **variables)
    (training,) = [command for command in commands if "megatron_long.pretrain" in command]
    others = [command for command in commands if command is not training]
    assert len(others) == len(TOOLS)
    for tool, command in zip(TOOLS, others, strict=True):
        argv = flags_after(command, f"tools/{tool}.py")
        args, layout = parser_of(tool).parse_known_args(argv)
        if tool.startswith("evaluate"):
            assert command[1:4] == ["--standalone", "--nproc-per-node", "8"]
            assert args.context_length == length
            check_context_length(length, layout)
            megatron = megatron_adapter.parse_flags(layout)
            model_parallel = megatron.tensor_model_parallel_size * megatron.context_parallel_size
            assert model_parallel == 8
        else:
            assert layout == []

    flags = flags_after(training, "megatron_long.pretrain")
    work = Path(flags[flags.index("--load") + 1]).parent
    write_fake_checkpoint(work / "base", None)
    (work / "data").symlink_to(tiny_dataset)
    ours, args = parse(flags, GPU, 8)
    assert ours.recipe == recipe
    assert args.seq_length == length
    assert args.train_iters == 7
    assert args.pretrained_checkpoint == str(work / "base")


def test_finished_steps_are_skipped(record, tmp_path):
    work = tmp_path / "work folder"
    for name in ("data", "base", "hf"):
        (work / name).mkdir(parents=True)
    for name in ("before.json", "after.json"):
        (work / name).touch()
    commands = record()
    programs = [
        word for command in commands for word in command if word.startswith("megatron_long.")
    ]
    assert programs == ["megatron_long.launch", "megatron_long.pretrain"]
    tools = [Path(word).stem for command in commands for word in command if word.endswith(".py")]
    assert tools == ["evaluate_needle", "report"]  # which resume, or are made anew


def test_missing_variable_is_named(tmp_path):
    result = run(tmp_path, MODEL="model", CORPUS="corpus", BOOK="book.txt", WORK="")
    assert result.returncode != 0
    assert "WORK: set it to the folder for all output" in result.stderr


def test_it_stays_short():
    assert len(SCRIPT.read_text().splitlines()) <= 80


@pytest.mark.slow
def test_the_whole_runs_on_a_tiny_model(warm_python, tmp_path, tiny_tokenizer):
    from transformers import AutoModelForCausalLM

    write_tiny_llama(tmp_path / "model", tiny_tokenizer)
    write_corpus(tmp_path / "corpus.jsonl", num_documents=600)
    sentence = "The token of the book is in the context of the model. "
    (tmp_path / "book.txt").write_text(sentence * 400)
    small = {
        "MODEL": "model",
        "CORPUS": "corpus.jsonl",
        "BOOK": "book.txt",
        "WORK": "work",
        "RECIPE": "tiny_debug",
        "LENGTH": 512,
        "TOKENS": "8K",
        "GPUS": 2,
        "TP": 1,
        "CP": 2,
        "NUM_LENGTHS": 2,
        "NUM_DEPTHS": 2,
        "MIN_LENGTH": 384,
        "PATH": f"{warm_python.parent}:{os.environ['PATH']}",
        "PYTHON": warm_python,
        "OMP_NUM_THREADS": 1,
        "PYTHONWARNINGS": "ignore",
    }
    result = run(tmp_path, "--train-iters", "2", "--global-batch-size", "2", **small)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    work = tmp_path / "work"
    for name in (
        "data/report/index.html",
        "base/release",
        "before.json",
        "ckpt/iter_0000002",
        "after-table.csv",
        "after.png",
        "needle/needle.png",
        "hf/verification.json",
        "report.html",
    ):
        assert (work / name).exists(), name
    exported = AutoModelForCausalLM.from_pretrained(work / "hf")
    assert exported.config.max_position_embeddings >= 512
