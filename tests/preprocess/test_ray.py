"""Ray on two nodes of this machine: a worker is killed, a node is lost, and the bytes are the same."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from megatron_long.errors import ConfigError, DataError
from megatron_long.files import atomic_path
from megatron_long.mixture.mixture import Mixture
from megatron_long.preprocess.executors import ExecutorOptions, run_stage
from megatron_long.preprocess.preprocess import preprocess
from megatron_long.preprocess.preprocess_config import PreprocessConfig
from tests.corpus_fixtures import files_of
from tests.launched import wait_until

os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # read when ray is imported
ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")
pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
OPTIONS = ExecutorOptions(executor="ray", workers=2, tasks=4, memory_gb=1)
SIZE = {"num_cpus": 1, "memory": 1 << 30, "object_store_memory": 100 << 20}


@pytest.fixture
def cluster(monkeypatch):
    """A head, and one more node; the process of the test is not connected."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    nodes = cluster_utils.Cluster(initialize_head=True, head_node_args=SIZE)
    try:
        nodes.add_node(**SIZE)
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


@dataclass(frozen=True)
class Held:
    """A stage whose items tell where they run, and wait until they may end."""

    work: Path
    name: str = "held"

    def is_done(self, index: int) -> bool:
        return (self.work / f"{index}.done").exists()

    def run(self, index: int) -> None:
        node = ray.get_runtime_context().get_node_id()
        with atomic_path(self.work / f"{index}.{node}.{os.getpid()}.begun") as path:
            path.touch()
        while not (self.work / "go").exists():
            time.sleep(0.05)
        with atomic_path(self.work / f"{index}.done") as path:
            path.write_text(node)


@contextlib.contextmanager
def meanwhile(action: Callable[[], None]):
    """Run an action next to the block; its failure fails the test."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join(300)
    assert not thread.is_alive()
    assert not errors, errors


def begun(work: Path, count: int) -> list[tuple[str, int]]:
    """Wait until as many items run; give node and process of each."""
    while len(found := sorted(work.glob("*.begun"))) < count:
        time.sleep(0.05)
    return [(path.name.split(".")[1], int(path.name.split(".")[2])) for path in found]


@pytest.mark.parametrize("lost", ["worker", "node"])
def test_items_of_what_was_lost_run_again(lost, cluster, tmp_path):
    def lose() -> None:
        (node, pid), (other, _) = begun(tmp_path, 2)
        assert node != other
        if lost == "worker":
            os.kill(pid, signal.SIGKILL)
            begun(tmp_path, 3)
        else:
            cluster.remove_node(min(cluster.worker_nodes, key=id), allow_graceful=False)
        (tmp_path / "go").touch()

    with meanwhile(lose):
        run_stage(Held(tmp_path), 6, OPTIONS)
    assert all((tmp_path / f"{index}.done").exists() for index in range(6))


def test_the_same_bytes_without_a_worker_and_a_node(
    cluster, model_file, records, write_jsonl, tmp_path
):
    for index in range(12):
        write_jsonl(tmp_path / "in" / f"{index}.jsonl", records * 4)
    mixture = Mixture(train_tokens=20_000, strategy="original", valid_tokens_per_source=1000)
    config = PreprocessConfig(
        inputs=[tmp_path / "in"], tokenizer=model_file, mixture=mixture, engine="reference"
    )
    preprocess(config, tmp_path / "local")

    def lose() -> None:
        wait_until(lambda: any((tmp_path / "out.work" / "tokens.0").glob("0*")))
        raylets = [node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()]
        workers = [one for pid in raylets for one in psutil.Process(pid).children()]
        working = [one for one in workers if "ray::_run_task" in one.name()]
        working[0].kill()
        cluster.remove_node(min(cluster.worker_nodes, key=id), allow_graceful=False)

    with meanwhile(lose):
        preprocess(replace(config, execution=OPTIONS), tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "local")


def test_an_error_of_a_task_comes_back(cluster, corpus, model_file, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    mixture = Mixture(train_tokens=9000, long_threshold_tokens=300, valid_tokens_per_source=2000)
    config = PreprocessConfig(
        inputs=[corpus, tmp_path / "bad.jsonl"],
        tokenizer=model_file,
        mixture=mixture,
        engine="reference",
        execution=OPTIONS,
    )
    with pytest.raises(DataError, match=r"bad\.jsonl:1 has no source"):
        preprocess(config, tmp_path / "none")


@dataclass(frozen=True)
class Deadly:
    """A stage whose item ends each process that runs it."""

    work: Path
    name: str = "deadly"

    def is_done(self, index: int) -> bool:
        return False

    def run(self, index: int) -> None:
        (self.work / f"{os.getpid()}.killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def test_an_item_that_kills_its_worker_each_time(cluster, tmp_path, caplog):
    options = replace(OPTIONS, memory_gb=2)
    cluster.add_node(num_cpus=1, memory=2 << 30, object_store_memory=100 << 20)
    with pytest.raises(
        ConfigError, match=r"--executor ray: .* give the same command again to resume"
    ):
        run_stage(Deadly(tmp_path), 1, options)
    assert len(list(tmp_path.glob("*.killed"))) == 4


def test_a_node_large_enough_is_waited_for(cluster, tmp_path, caplog):
    (tmp_path / "go").touch()

    with meanwhile(lambda: run_stage(Held(tmp_path), 1, replace(OPTIONS, memory_gb=2))):
        told = "no node of the Ray cluster has as much (the largest: 1.0)"
        wait_until(lambda: told in caplog.text)
        cluster.add_node(num_cpus=1, memory=2 << 30, object_store_memory=100 << 20)
    assert (tmp_path / "0.done").exists()
