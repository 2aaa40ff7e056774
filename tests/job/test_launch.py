"""What the launcher says and returns when a rank has failed."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
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


class Child:
    """A child of the launcher as psutil shows it."""

    def __init__(self, environment: dict[str, str] | psutil.Error) -> None:
        self.environment = environment
        self.signals: list[int] = []

    def environ(self) -> dict[str, str]:
        if isinstance(self.environment, psutil.Error):
            raise self.environment
        return self.environment

    def send_signal(self, number: int) -> None:
        self.signals.append(number)


@pytest.mark.parametrize(
    ("environment", "is_told"),
    [
        ({"TORCHELASTIC_RUN_ID": "none"}, True),
        ({}, True),
        (psutil.ZombieProcess(1), False),
        (psutil.NoSuchProcess(1), False),
    ],
    ids=["rank", "rank that starts another program", "rank that has ended", "rank that is ending"],
)
def test_the_launcher_stays_while_a_rank_leaves(environment, is_told, monkeypatch):
    """Torchrun then meets the other nodes, which would wait for this one for five minutes."""
    child = Child(environment)
    monkeypatch.setattr(
        launch, "psutil", SimpleNamespace(**vars(psutil) | {"Process": lambda: parent})
    )
    parent = SimpleNamespace(children=lambda: [child])
    launch._hand_on(signal.SIGTERM, None)
    assert child.signals == ([signal.SIGTERM] if is_told else [])


@pytest.mark.parametrize("children", [[], [Child({"PATH": "/bin"})]], ids=["none", "monitor"])
def test_the_launcher_leaves_where_no_rank_runs(children, monkeypatch, capfd):
    parent = SimpleNamespace(children=lambda: children)
    monkeypatch.setattr(
        launch, "psutil", SimpleNamespace(**vars(psutil) | {"Process": lambda: parent})
    )
    with pytest.raises(SystemExit) as left:
        launch._hand_on(signal.SIGTERM, None)
    assert left.value.code == 0
    assert "while no rank was running" in capfd.readouterr().err
