"""Training by the launch script's command, started by tests: with helpers, temporary files and a terminal."""

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.job_fixtures import FLAGS

REPOSITORY = Path(__file__).resolve().parents[1]
TRACKER = "latest_checkpointed_iteration.txt"
GRACE_S = 300
OF_OTHERS = re.compile(r"^torchinductor_|wandb-(artifacts|media)$")
"""Temporary files that may stay: torch's cache, and W&B's empty folders of a rank that was killed."""


def wait_until(condition: Callable[[], bool], seconds: float = GRACE_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def tracked(folder: Path) -> int:
    return int((folder / TRACKER).read_text())


def start_launcher(
    dataset: Path,
    *flags: object,
    options: tuple[str, ...] = (),
    temporary: Path | None = None,
    terminal: int | None = None,
) -> subprocess.Popen:
    """Start the launcher with two ranks.

    Args:
        options: Flags of the launcher.
        temporary: Folder for temporary files; None is everybody's.
        terminal: Descriptor of the terminal that it is to have; None for none, and no output.
    """
    command = [sys.executable, "-m", "megatron_long.launch", "--standalone", "--nproc-per-node=2"]
    command += options
    command += ["-m", "megatron_long.pretrain", *FLAGS, "--dataset", dataset, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    stream = subprocess.DEVNULL if terminal is None else terminal
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=REPOSITORY,
        env=environment | ({"TMPDIR": str(temporary)} if temporary else {}),
        stdin=stream,
        stdout=stream,
        stderr=stream,
        start_new_session=True,
        preexec_fn=None if terminal is None else take_terminal,
    )


def take_terminal() -> None:
    """Make standard input the terminal of this session, which sends it Ctrl-C and tells it of its own end."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def all_processes(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The launcher, its two ranks, and what they have started."""
    launching = psutil.Process(launcher.pid)
    ranks = launching.children()
    assert len(ranks) == 2
    helpers = [helper for rank in ranks for helper in rank.children(recursive=True)]
    return [launching, *ranks, *helpers]


def wait_for_helpers(launcher: subprocess.Popen, out: Path) -> list[psutil.Process]:
    """Wait for the first save; give all processes."""
    wait_until(lambda: (out / TRACKER).exists())
    processes = all_processes(launcher)
    assert len(processes) >= 7  # a resource tracker and a spawned process a rank
    return processes


def end_all(launcher: subprocess.Popen) -> None:
    """Kill what still runs."""
    if launcher.poll() is None:
        for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
            process.kill()


class Launched:
    """A launcher that leaves nothing; `with` ends it."""

    def __init__(self, dataset: Path, *flags: object, terminal: int | None = None) -> None:
        """Start it.

        Args:
            terminal: See `start_launcher`; it is closed here.
        """
        # Short, for multiprocessing's sockets lie there, and their paths may have 107 characters.
        self.temporary = Path(tempfile.mkdtemp(prefix="t-"))
        self.launcher = start_launcher(dataset, *flags, temporary=self.temporary, terminal=terminal)
        if terminal is not None:
            os.close(terminal)

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        end_all(self.launcher)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def check_left(self, status: int, processes: list[psutil.Process]) -> None:
        """It ends with this status; none of these processes is left, and no temporary file."""
        assert self.launcher.wait(GRACE_S) == status
        assert psutil.wait_procs(processes, GRACE_S)[1] == []
        names = {path.name for path in self.temporary.iterdir()}
        assert {name for name in names if not OF_OTHERS.search(name)} == set()


class Terminal:
    """A terminal with a person before it, who reads all that comes."""

    def __init__(self) -> None:
        self.person, self.program = os.openpty()
        os.set_blocking(self.person, False)
        self.text = ""

    def reads(self, words: str = "") -> bool:
        """Read on; whether the words have come."""
        with contextlib.suppress(OSError):  # nothing there, or nobody who could write
            while content := os.read(self.person, 65536):
                self.text += content.decode(errors="replace")
        return words in self.text

    def press_ctrl_c(self) -> None:
        """Press it."""
        os.write(self.person, b"\x03")

    def close(self) -> None:
        """Close it, as with the window or a lost connection."""
        os.close(self.person)
