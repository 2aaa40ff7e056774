"""Errors of the user end a tool with one paragraph, others with a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_long.cli import run_tool

REPOSITORY = Path(__file__).resolve().parents[1]
PRINT_MUCH = """
import sys
from megatron_long.cli import run_tool
def main():
    for number in range(100_000):
        print(number)
sys.exit(run_tool(main, prints_result={}))
"""


def write_to_nobody() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        os.write(writer, b"x")
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    ("buffering", "prints_result", "status"), [("", True, 0), ("-u", True, 0), ("", False, 1)]
)
def test_output_that_is_cut(buffering, prints_result, status):
    """By a real `| head`; the tool's status, not that of head."""
    pipeline = f'"$0" {buffering} -c "$1" | head -n 1; exit ${{PIPESTATUS[0]}}'
    result = subprocess.run(
        ["bash", "-c", pipeline, sys.executable, PRINT_MUCH.format(prints_result)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert result.stdout == "0\n"
    assert result.returncode == status
    assert ("BrokenPipeError" in result.stderr) == (status != 0)
    assert ("Traceback" in result.stderr) == (status != 0)


@pytest.mark.parametrize("prints_result", [True, False])
def test_another_broken_pipe_is_an_error(prints_result):
    with pytest.raises(BrokenPipeError):
        run_tool(write_to_nobody, prints_result=prints_result)


@pytest.mark.parametrize("name", ["x" * 256, os.fsdecode(b"x\xff")], ids=["long", "not UTF-8"])
def test_names_that_no_file_can_have(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tool", "--output", str(tmp_path / name)])
    assert run_tool(lambda: (tmp_path / name).write_text(str(tmp_path / name), "utf-8")) == 2
    told = capsys.readouterr().err
    assert "give" in told
    assert "udcff" in told or "is too long" in told


def test_other_system_errors_stay_errors(tmp_path):
    with pytest.raises(IsADirectoryError):
        run_tool(lambda: tmp_path.read_text() and None)


FAILS_ON = """
import os, sys, time
from megatron_long.cli import run_tool
from megatron_long.errors import ConfigError
def main():
    if os.environ["LOCAL_RANK"] not in sys.argv[1]:
        time.sleep(600)  # until torchrun ends it
    raise ConfigError("--this is wrong")
sys.exit(run_tool(main))
"""


@pytest.mark.parametrize("ranks", ["0", "1", "012"])
def test_a_job_tells_its_error_once_whichever_rank_meets_it_first(ranks, tmp_path):
    """Torchrun ends the other ranks, the first of them too, as soon as one has failed."""
    script = tmp_path / "tool.py"
    script.write_text(FAILS_ON)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "3", str(script), ranks]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.stderr.count("error: --this is wrong") == 1
