"""What the launcher says and returns when a rank has failed."""

import signal
import subprocess
import sys

import pytest

from megatron_long import launch
from tests.launched import REPOSITORY


def test_the_status_and_the_message_are_those_of_the_rank():
    """Not torchrun's 1, and not its thirty lines."""
    command = ["-m", "megatron_long.launch", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "megatron_long.pretrain", "--recipe", "tiny_debug", "--nonsense"]
    result = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 2
    assert result.stderr.count("unrecognized arguments: --nonsense") == 1
    assert "ended with status 2" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("status", "result", "words"),
    [
        (3, 3, "ended with status 3"),
        (-signal.SIGKILL, 1, "was killed by SIGKILL: the kernel does that when memory runs out"),
        (-signal.SIGSEGV, 1, "was killed by SIGSEGV\n"),
    ],
)
def test_a_rank_that_was_killed(status, result, words, capsys):
    assert launch._tell(5, status) == result
    said = capsys.readouterr().err
    assert said.startswith("error: rank 5 on ")
    assert words in said
