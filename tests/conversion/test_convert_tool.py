"""The command line: both directions, and errors of one paragraph with exit status 2."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import REPOSITORY

TOOL = "tools/convert_checkpoint.py"


def test_both_ways(make_llama, run_job, read_weights, tmp_path):
    source = make_llama()
    ways = (
        ["hf-to-megatron", "--input", source, "--output", tmp_path / "ckpt"],
        ["megatron-to-hf", "--input", tmp_path / "ckpt", "--output", tmp_path / "hf"],
    )
    for way in ways:
        result = run_job(1, [TOOL, *way, "--verify"], fresh=True)
        assert result.stdout.startswith(f"wrote {way[-1]}: 21 tensors")
        assert "every bit equal" in result.stdout
    before, after = read_weights(source), read_weights(tmp_path / "hf")
    assert all(before[name].equal(after[name]) for name in before | after)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing(number, make_llama, tmp_path):
    """While it compares logits, in a process of its own, which ends too."""
    command = [sys.executable, TOOL, "hf-to-megatron", "--input", make_llama(), "--verify"]
    tool = subprocess.Popen([*command, "--output", tmp_path / "ckpt"], cwd=REPOSITORY)
    deadline = time.monotonic() + 120
    children: list[psutil.Process] = []
    while not (children and any(tmp_path.iterdir())):
        assert tool.poll() is None
        assert time.monotonic() < deadline
        children = [
            child
            for child in psutil.Process(tool.pid).children()
            if any("logits_check" in word for word in child.cmdline())
        ]
        time.sleep(0.05)
    os.kill(tool.pid, number)
    assert tool.wait(60) == (130 if number == signal.SIGINT else 128 + number)
    assert list(tmp_path.iterdir()) == []
    assert psutil.wait_procs(children, timeout=60)[1] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "nowhere", "--output", "out"], "error: --input nowhere does not exist"),
        (["--output", "out"], "the following arguments are required: --input"),
        (["--input", "a", "--output", "b", "--dtype", "int4"], "invalid choice: 'int4'"),
    ],
)
def test_errors_of_the_user(run_job, flags, message):
    result = run_job(1, [TOOL, "hf-to-megatron", *flags], check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
