"""Hands Python programs to `warm_server.py`, which starts them without ten seconds of imports each."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SERVER = Path(__file__).with_name("warm_server.py")


class WarmJobs:
    """A server, started with the first job."""

    def __init__(self, folder: Path, python: Path) -> None:
        self.folder, self.python, self.count = folder, python, 0
        self.process: subprocess.Popen[str] | None = None

    def run(
        self,
        num_processes: int,
        words: Sequence[str],
        environment: Mapping[str, str],
        timeout: int,
    ) -> subprocess.CompletedProcess[str]:
        """Run `python WORDS` on this many processes, as torchrun would, and wait.

        Raises: subprocess.TimeoutExpired: it was not over after `timeout` seconds, and was killed.
        """
        if self.process is None:
            self.process = subprocess.Popen(
                [self.python, SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
                text=True,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        job = {"processes": num_processes, "words": list(words), "folder": str(folder)}
        job |= {"environment": dict(environment), "cwd": str(REPOSITORY), "timeout": timeout}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        status = json.loads(self.process.stdout.readline())
        written = [
            path.read_text(errors="replace") if path.exists() else ""
            for path in (folder / "stdout", folder / "stderr")
        ]
        if status is None:
            raise subprocess.TimeoutExpired(list(words), timeout, *written)
        return subprocess.CompletedProcess(list(words), status, *written)

    def close(self) -> None:
        """End the server."""
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(30)
