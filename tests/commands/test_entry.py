"""`megatron-long`: every command is there, takes its flags, and is the tool of the same name."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_long import entry

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_long.entry", *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_without_a_command_all_are_listed(monkeypatch, capsys):
    for words in ([], ["-h"], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["megatron-long", *words])
        assert entry.main() == 0
        printed = capsys.readouterr().out
        assert all(f"  {name} " in printed for name in entry.COMMANDS)


@pytest.mark.parametrize("words", [["evaluate", "hay"], ["evaluate"], ["trian"], ["--input", "x"]])
def test_what_is_not_a_command_is_named_with_the_choices(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["megatron-long", *words])
    assert entry.main() == 2
    message = " ".join(capsys.readouterr().err.split())
    assert (
        f"megatron-long {' '.join(words[:2] if words[0] == 'evaluate' else words[:1])} is not"
        in message
    )
    assert "evaluate needle, evaluate ruler, evaluate loss" in message


def test_every_module_has_a_main():
    for module, _ in entry.COMMANDS.values():
        assert callable(importlib.import_module(f"megatron_long.{module}").main)


def test_every_tool_is_a_command():
    """And nothing but a wrapper, in the repository."""
    tools = {path.stem for path in (REPOSITORY / "tools").glob("*.py")}
    assert tools == {module.split(".")[1] for module, _ in entry.COMMANDS.values() if "." in module}
    for name in tools:
        lines = (REPOSITORY / "tools" / f"{name}.py").read_text().splitlines()
        assert f"from megatron_long.commands.{name} import main" in lines
        assert len(lines) < 12


def test_a_command_runs_with_its_flags_and_status():
    result = run("recipe", "llama3_8b_128k")
    assert result.returncode == 0, result.stderr
    assert "--rotary-base" in result.stdout
    refused = run("evaluate", "loss", "--no-such-flag")
    assert refused.returncode == 2
    assert "usage: megatron-long evaluate loss" in refused.stderr


@pytest.mark.parametrize("name", ["train", "launch"])
def test_training_is_the_program_that_torchrun_starts(name):
    """So that helper processes of it find its main module, and its status is that of the program."""
    result = run(name, "--help")
    assert result.returncode == 0, result.stderr
    assert {"train": "--dataset", "launch": "--nproc-per-node"}[name] in result.stdout


def test_a_reader_that_has_enough_of_the_list_is_no_error():
    pipeline = '"$0" -m megatron_long.entry | head -n 1; exit ${PIPESTATUS[0]}'
    result = subprocess.run(
        ["bash", "-c", pipeline, sys.executable], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
