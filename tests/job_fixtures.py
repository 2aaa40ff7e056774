"""A small training run, and a server that starts jobs of several processes in a second."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SERVER = Path(__file__).with_name("job_server.py")
FLAGS = """
--recipe tiny_debug --num-layers 2 --hidden-size 64 --kv-channels 16 --ffn-hidden-size 128
--padded-vocab-size 512 --seq-length 128 --max-position-embeddings 128 --micro-batch-size 1
--global-batch-size 4 --lr 2e-3 --min-lr 2e-3 --save-interval 1000
""".split()


@dataclass(frozen=True)
class Job:
    """What became of a job."""

    statuses: list[int]
    logs: list[str]

    @property
    def text(self) -> str:
        """What all ranks wrote."""
        return "\n".join(self.logs)


class JobServer:
    """Starts `job_server.py` and hands it jobs."""

    def __init__(self, folder: Path, dataset: Path, python: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [python, SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.folder, self.dataset, self.count = folder, dataset, 0
        self.pids: list[int] = []

    def start(
        self,
        ranks: int,
        *flags: object,
        faults: Sequence[dict[str, Any]] = (),
        base: Sequence[str] = FLAGS,
    ) -> None:
        """Start a training job with the flags of `base` and these."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.count += 1
        argv = [*base, "--dataset", str(self.dataset), *map(str, flags)]
        job = {"ranks": ranks, "argv": argv, "log": str(self.log), "faults": list(faults)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        self.pids = json.loads(self.process.stdout.readline())

    @property
    def log(self) -> Path:
        """Where the present job's ranks write, but for their numbers."""
        return self.folder / f"job{self.count}.log"

    def wait(self) -> Job:
        """Wait for the job that was started."""
        assert self.process.stdout is not None
        statuses = json.loads(self.process.stdout.readline())
        paths = [self.log.with_name(f"{self.log.name}.{rank}") for rank in range(len(statuses))]
        return Job(statuses, [path.read_text(errors="replace") for path in paths])

    def run(
        self, ranks: int, *flags: object, faults: Sequence[dict[str, Any]] = (), status: int = 0
    ) -> Job:
        """Run a job to its end, which must be this status on every rank."""
        self.start(ranks, *flags, faults=faults)
        job = self.wait()
        assert job.statuses == [status] * ranks, (job.statuses, job.text[-5000:])
        return job


@pytest.fixture(scope="session")
def jobs(
    tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path, warm_python: Path
) -> Iterator[JobServer]:
    """The job server."""
    server = JobServer(tmp_path_factory.mktemp("jobs"), tiny_dataset, warm_python)
    yield server
    assert server.process.stdin is not None
    server.process.stdin.close()
    server.process.wait(30)


@pytest.fixture(scope="session")
def read_log() -> Callable[[Path], list[dict[str, Any]]]:
    """A function that reads a `--loss-log`."""

    def read(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    return read


@pytest.fixture(scope="session")
def base(jobs: JobServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to start from."""
    folder = tmp_path_factory.mktemp("base") / "ckpt"
    jobs.run(1, "--train-iters", 1, "--save", folder)
    return folder


@pytest.fixture
def flags(base: Path, tmp_path: Path) -> tuple:
    """What the launch script gives: the same words start a run and go on with it."""
    return (
        *("--pretrained-checkpoint", base, "--load", tmp_path / "out", "--save", tmp_path / "out"),
        *("--loss-log", tmp_path / "log.jsonl", "--allow-repeat", "--train-iters", 300),
    )
