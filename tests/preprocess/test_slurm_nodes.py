"""SLURM itself on two nodes that are this machine: a task killed, a node lost, a run killed and given again.

Root types

    SLURM_TESTS=1 pytest tests/preprocess/test_slurm_nodes.py
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import s3_store, slurm_cluster
from tests.corpus_fixtures import files_of
from tests.preprocess.test_interrupt import started

ASKED = os.environ.get("SLURM_TESTS") == "1"
LACKING = slurm_cluster.missing() if ASKED else "SLURM_TESTS=1 is not set: minutes, with daemons"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(LACKING is not None, reason=str(LACKING))]
REPOSITORY = Path(__file__).resolve().parents[2]
pytest.importorskip("datatrove")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("slurm")
    with slurm_cluster.start(folder, num_nodes=2) as environment:
        yield environment


class Run:
    """The command on both nodes."""

    def __init__(self, cluster, words, output):
        self.cluster, self.output, self.work = cluster, output, Path(f"{output}.work")
        self.words = [*words, "--output", output, "--executor", "slurm", "--workers", 2]
        self.words += ["--slurm-partition", slurm_cluster.PARTITION, "--task-memory-gb", 1]

    def start(self, *more):
        return started([*self.words, *more], self.cluster | {"PYTHONPATH": str(REPOSITORY)})

    def ask(self, *command):
        return slurm_cluster.ask(self.cluster, *command)

    def tasks(self):
        """Node of each running task, by its number."""
        lines = self.ask("squeue", "-h", "--states=RUNNING", "-o", "%i %N").splitlines()
        return dict(line.split() for line in lines)

    def processes(self, node):
        """The processes of the tasks on a node."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if f"SLURMD_NODENAME={node}\0".encode() in (path / "environ").read_bytes():
                    found.append(int(path.name))
            except OSError:
                pass
        return found

    def wait(self, condition, run, seconds=300):
        deadline = time.monotonic() + seconds
        while not condition():
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < deadline, self.ask("squeue")
            time.sleep(0.1)


@pytest.fixture
def run(cluster, model_file, records, write_jsonl, tmp_path):
    for index in range(12):
        write_jsonl(tmp_path / "in" / f"{index}.jsonl", records * 4)
    words = ["tools/preprocess_mix.py", "--input", tmp_path / "in", "--tokenizer", model_file]
    words += ["--train-tokens", "20K", "--valid-tokens-per-source", "1K", "--engine", "reference"]
    words += ["--strategy", "original"]
    with started([*words, "--output", tmp_path / "local"]) as local:
        local.communicate(timeout=300)
    assert local.returncode == 0
    return Run(cluster, words, tmp_path / "out")


def finish(run, process):
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert files_of(run.output) == files_of(run.output.with_name("local"))
    assert not run.ask("squeue", "-h")


def test_two_nodes(run):
    nodes = set()
    with run.start("--tasks", 4) as process:
        run.wait(lambda: nodes.update(run.tasks().values()) or len(nodes) == 2, process)
        finish(run, process)


def test_a_task_that_is_killed(run):
    """Its other files stay undone: the run says so, and resumes."""
    with run.start("--tasks", 2) as process:
        run.wait(lambda: any((run.work / "tokens.0").glob("0*")), process)
        for pid in run.processes("node1"):
            os.kill(pid, signal.SIGKILL)
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "give the same command again to resume" in " ".join(stderr.split())
    assert not run.output.exists()
    with run.start("--tasks", 2) as process:
        finish(run, process)


def test_a_lost_node(run):
    """SLURM queues the tasks of a lost node again, and the waiting run does not notice."""
    with run.start("--tasks", 2) as process:
        run.wait(lambda: any((run.work / "tokens.0").glob("0*")), process)
        run.ask("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=lost")
        for pid in run.processes("node2"):
            os.kill(pid, signal.SIGKILL)
        run.wait(lambda: "node2" not in run.tasks().values(), process)
        finish(run, process)
    run.ask("scontrol", "update", "NodeName=node2", "State=RESUME")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_ends_before_its_tasks(how, run):
    """Killed, it leaves its tasks in the queue: the next start ends them; otherwise it does so itself."""
    with run.start("--tasks", 12) as process:
        run.wait(lambda: any((run.work / "tokens.0").glob("0*")), process)
        process.send_signal(how)
        process.wait()
    if how == signal.SIGINT:
        assert "preprocess" not in run.ask("squeue", "-h", "--states=PENDING,RUNNING", "-o", "%j")
    assert not run.output.exists()
    with run.start("--tasks", 3) as process:
        finish(run, process)


def test_corpus_and_dataset_in_an_object_store(run, tmp_path):
    count = itertools.count(1)
    with s3_store.start() as store:
        store.files().mkdir("bucket")
        store.files().put(f"{tmp_path / 'in'}/", "bucket/in/", recursive=True)
        words = ["s3://bucket/in" if word == tmp_path / "in" else word for word in run.words]
        words = ["s3://bucket/out" if word == run.output else word for word in words]
        store.fail(lambda *request: "cut" if next(count) % 9 == 0 else None)
        environment = run.cluster | store.environment | {"PYTHONPATH": str(REPOSITORY)}
        with started([*words, "--work-dir", run.work, "--tasks", 4], environment) as process:
            _, stderr = process.communicate(timeout=600)
        assert process.returncode == 0, stderr
        store.heal()
        store.files().get("bucket/out/", f"{run.output}/", recursive=True)
    assert files_of(run.output) == files_of(run.output.with_name("local"))


def test_inside_a_job_with_its_own_memory(run):
    """What SLURM tells of the job that starts the others is not for them."""
    words = [sys.executable, *map(str, run.words), "--tasks", "2"]
    command = [
        "sbatch",
        "--wait",
        "--mem=500M",
        "--ntasks=1",
        f"--output={run.output}.log",
        "--wrap",
    ]
    environment = run.cluster | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([*command, " ".join(words)], cwd=REPOSITORY, env=environment, check=False)
    assert files_of(run.output) == files_of(run.output.with_name("local")), Path(
        f"{run.output}.log"
    ).read_text()
