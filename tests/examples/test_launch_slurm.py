"""examples/pretrain_llama_128k.sh under SLURM itself, on two nodes that are this machine.

What `test_launch_script.py` does with a stand-in for srun, with the real one: its way of reading flags and of
passing signals on is not ours to imitate. Root types

    SLURM_TESTS=1 pytest tests/examples/test_launch_slurm.py
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import slurm_cluster

ASKED = os.environ.get("SLURM_TESTS") == "1"
LACKING = slurm_cluster.missing() if ASKED else "SLURM_TESTS=1 is not set: 8 minutes, with daemons"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(LACKING is not None, reason=str(LACKING))]
REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = ["--hidden-size", 64, "--kv-channels", 16, "--ffn-hidden-size", 128, "--num-layers", 2]
MODEL += [
    "--padded-vocab-size",
    512,
    "--seq-length",
    128,
    "--global-batch-size",
    2,
    "--allow-repeat",
]
MODEL += ["--override-opt-param-scheduler"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("slurm")
    with slurm_cluster.start(folder, num_nodes=2, gpus=1) as environment:
        yield environment


class Job:
    """The launch script as `sbatch` starts it."""

    def __init__(self, cluster: dict[str, str], output: Path, **variables: object) -> None:
        self.output = output
        self.environment = cluster | {name: str(value) for name, value in variables.items()}
        self.environment |= {
            "OUTPUT": str(output),
            "HEAD_NODE": "localhost",  # the nodes' names are not known to the resolver
            "PYTHON": sys.executable,
            "RECIPE": "tiny_debug",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.number = ""

    def submit(self, options: list[str], *flags: object) -> None:
        """Queue it on both nodes; `options` are sbatch's."""
        options = [*options, "--nodes=2", "--gpus-per-node=1", f"--output={self.output}.%j"]
        flags = (*MODEL, "--context-parallel-size", 2, *flags)
        command = ["sbatch", "--parsable", *options, "examples/pretrain_llama_128k.sh"]
        command += [str(flag) for flag in flags]
        submitted = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        self.number = submitted.stdout.strip()

    def ask(self, *command: str) -> str:
        return slurm_cluster.ask(self.environment, *command)

    def state(self) -> str:
        """`RUNNING`, `PENDING` …; `` once SLURM has let it go."""
        text = self.ask("scontrol", "--oneliner", "show", "job", self.number)
        words = dict(word.split("=", 1) for word in text.split() if "=" in word)
        return words.get("JobState", "")

    def said(self) -> str:
        logs = [Path(f"{self.output}.{self.number}"), *(self.output / "logs").glob("*")]
        return "\n".join(path.read_text(errors="replace") for path in logs if path.exists())

    def steps(self) -> int:
        log = self.output / "loss.jsonl"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def saved(self) -> int:
        return int((self.output / "latest_checkpointed_iteration.txt").read_text())

    def wait(self, condition: Callable[[], bool], seconds: float = 150) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{self.state()}: {self.said()}"
            time.sleep(0.3)


@pytest.fixture
def job(cluster, tmp_path, tiny_dataset, run_job) -> Iterator[Job]:
    start = tmp_path / "start"
    first = ["-m", "megatron_long.pretrain", "--recipe", "tiny_debug", "--dataset", tiny_dataset]
    run_job(1, [*first, *MODEL, "--train-iters", 1, "--save", start])
    made = Job(cluster, tmp_path / "output", CHECKPOINT=start, DATASET=tiny_dataset)
    yield made
    made.ask("scancel", made.number)
    made.wait(lambda: made.state() not in ("RUNNING", "COMPLETING"))


def test_time_limit_saves_and_the_queued_job_goes_on(job):
    """The signal is SLURM's own, a minute before the limit; the job comes back from the queue by itself."""
    flags = ("--train-iters", 100_000, "--save-interval", 50)
    job.submit(["--time=4", "--signal=B:USR1@60"], *flags)
    job.wait(lambda: (job.output / "iter_0000050").is_dir(), 200)  # its helpers get the signal, too
    job.wait(lambda: "time is up, queued again" in job.said(), 300)
    assert job.saved() == job.steps() >= 1, job.said()
    before = job.steps()
    assert "DUE TO TIME LIMIT" not in job.said()
    job.wait(lambda: job.state() == "PENDING")
    job.wait(lambda: job.steps() > before, 240)  # SLURM starts it after two minutes, no earlier
    assert "start 1, 2 nodes" in job.said()
    log = [json.loads(line) for line in (job.output / "loss.jsonl").read_text().splitlines()]
    assert [step["iteration"] for step in log] == list(range(1, len(log) + 1))


def test_lost_node_loses_one_save_interval_at_most(job):
    job.submit(["--time=30"], "--train-iters", 100_000, "--save-interval", 5)
    job.wait(lambda: job.steps() >= 12)
    job.ask("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=lost")
    job.wait(lambda: job.state() == "PENDING")
    saved, before = job.saved(), job.steps()
    assert 0 <= before - saved <= 5
    job.ask("scontrol", "update", "NodeName=node2", "State=RESUME")
    job.wait(lambda: job.steps() > before + 2, 240)
    assert "start 1, 2 nodes" in job.said()
    log = [json.loads(line) for line in (job.output / "loss.jsonl").read_text().splitlines()]
    assert log[before]["iteration"] == saved + 1


@pytest.mark.parametrize("options", [(), ("--batch", "--signal=TERM")], ids=["all", "script"])
def test_cancelled_job_saves_and_is_not_queued_again(options, job):
    job.submit(["--time=30"], "--train-iters", 100_000, "--save-interval", 50)
    job.wait((job.output / "iter_0000050").is_dir)
    job.ask("scancel", *options, job.number)
    job.wait(lambda: job.state() not in ("RUNNING", "COMPLETING"))
    assert job.state() == ("COMPLETED" if options else "CANCELLED")
    assert job.saved() == job.steps()
    assert "queued again" not in job.said()


def test_finished_and_refused_jobs_leave_with_their_status(job):
    job.submit(["--time=30"], "--train-iters", 2)
    job.wait(lambda: job.state() not in ("PENDING", "RUNNING", "COMPLETING"))
    assert job.state() == "COMPLETED", job.said()
    assert job.saved() == 2
    job.submit(["--time=30"], "--train-iters", 4, "--tensor-model-parallel-size", 3)
    job.wait(lambda: job.state() not in ("PENDING", "RUNNING", "COMPLETING"))
    assert "ExitCode=2:0" in job.ask("scontrol", "show", "job", job.number)
    assert "cannot hold whole replicas" in " ".join(job.said().split())
