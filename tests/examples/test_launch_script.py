"""examples/pretrain_llama_128k.sh prints a command that the real parser takes, alone and under SLURM."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_long.engine import host_backend
from megatron_long.flags.backend import GPU
from tests.fake_checkpoints import write_fake_checkpoint

host_backend.install()

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "pretrain_llama_128k.sh"


def dry_run(*argv: str, **variables: object) -> list[str]:
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "NPROC_PER_NODE": "8"}
    environment |= {name: str(value) for name, value in variables.items()}
    result = subprocess.run(
        ["bash", SCRIPT, *argv], env=environment, capture_output=True, text=True, check=True
    )
    return shlex.split(result.stdout)


@pytest.fixture
def paths(tmp_path: Path, tiny_dataset: Path) -> dict[str, Path]:
    checkpoint = tmp_path / "check point"  # the space must survive quoting
    write_fake_checkpoint(checkpoint, None)
    return {"CHECKPOINT": checkpoint, "DATASET": tiny_dataset, "OUTPUT": tmp_path / "out"}


def training_flags(command: list[str]) -> list[str]:
    return command[command.index("megatron_long.pretrain") + 1 :]


def test_a_run_can_be_the_start_instead(paths):
    flags = training_flags(dry_run(NEXT_STAGE_OF="a run", **(paths | {"CHECKPOINT": ""})))
    assert flags[flags.index("--next-stage-of") + 1] == "a run"
    assert "--pretrained-checkpoint" not in flags


@pytest.mark.parametrize(
    "recipe", ["llama3_8b_128k", "llama2_7b_80k", "llama2_7b_128k", "llama2_13b_64k"]
)
def test_printed_command_parses(recipe, paths):
    from megatron_long.command_line import parse

    command = dry_run("--train-iters", "7", "--allow-repeat", RECIPE=recipe, **paths)
    assert command[:5] == ["python3", "-m", "megatron_long.launch", "--nproc-per-node", "8"]
    ours, args = parse(training_flags(command), GPU, 8)
    assert ours.recipe == recipe
    assert args.pretrained_checkpoint == str(paths["CHECKPOINT"])
    assert args.load == args.save == str(paths["OUTPUT"])
    assert args.train_iters == 7
    assert args.lr == 2e-5
    if recipe.endswith("128k"):
        assert args.seq_length == 131_072
        assert args.global_batch_size * args.seq_length == 4_194_304


def test_slurm_starts_one_launcher_a_node(paths):
    slurm = {"SLURM_JOB_ID": 77, "SLURM_NNODES": 4, "SLURM_GPUS_ON_NODE": 8}
    command = dry_run(HEAD_NODE="node-a", **slurm, **paths)
    text = " ".join(command)
    assert command[0] == "srun"
    assert "--nnodes 4" in text
    assert "srun --nodes=4" in text
    assert "--rdzv-endpoint node-a:20077" in text
    assert "--ntasks-per-node=1" in text
    assert "--kill-on-bad-exit=1" in text  # srun would run a "1" that stands alone


def test_header_asks_for_memory_and_for_time_to_save():
    header = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --mem=0" in header  # all of a node's: SLURM's default may be a part
    signals = [line.partition("B:USR1@")[2] for line in header if "--signal" in line]
    assert signals == ["900"]


def test_saves_by_time_and_keeps_the_last_few(paths):
    from megatron_long.command_line import parse

    def kept(*argv: str, **variables: object):
        command = dry_run(*argv, "--train-iters", "7", "--allow-repeat", **variables, **paths)
        ours, args = parse(training_flags(command), GPU, 8)
        return ours.keep_last, args.save_minutes

    assert kept() == (3, 30.0)
    assert kept(KEEP_LAST=0) == (0, 30.0)
    assert kept("--keep-last", "5", "--save-interval", "10") == (5, 0.0)


COUNT_GPUS = """#!/bin/sh
case "$*" in *nvidia-smi*) for n in {numbers}; do echo "GPU $n: H100"; done;; *) exit 1;; esac
"""


@pytest.fixture
def slurm_login(tmp_path: Path):
    """A shell on a login node, where salloc leaves it: no GPU here, so many on the nodes of the job."""

    def run(num_gpus: int, paths: dict[str, Path], **variables: object):
        binaries = tmp_path / "bin"
        binaries.mkdir(exist_ok=True)
        for name, text in (
            ("srun", COUNT_GPUS.format(numbers=" ".join(map(str, range(num_gpus))))),
            ("nvidia-smi", "#!/bin/sh\nexit 9\n"),
        ):
            (binaries / name).write_text(text)
            (binaries / name).chmod(0o755)
        environment = {"PATH": f"{binaries}:{os.environ['PATH']}", "DRY_RUN": "1"}
        job = {"SLURM_JOB_ID": 77, "SLURM_NNODES": 2, "HEAD_NODE": "node-a"}
        environment |= {k: str(v) for k, v in (job | variables | paths).items()}
        return subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    ("num_gpus", "variables", "expected"),
    [
        (4, {}, 4),
        (4, {"SLURM_GPUS_PER_NODE": "8"}, 8),
        (4, {"SLURM_GPUS_PER_NODE": "h100:8"}, 8),
        (4, {"SLURM_GPUS_PER_NODE": "a:1,b:2"}, 4),
        (4, {"SLURM_GPUS_ON_NODE": "2", "SLURM_GPUS_PER_NODE": "8"}, 2),
        (0, {"NPROC_PER_NODE": "6"}, 6),
    ],
)
def test_gpus_are_counted_on_the_nodes_of_the_job(
    num_gpus, variables, expected, slurm_login, paths
):
    result = slurm_login(num_gpus, paths, **variables)
    assert result.returncode == 0, result.stderr
    assert f"--nproc-per-node {expected} " in result.stdout


def test_a_job_without_gpus_is_refused(slurm_login, paths):
    result = slurm_login(0, paths)
    assert result.returncode == 2
    assert "job 77 has 0 GPUs on a node" in result.stderr
    assert "set NPROC_PER_NODE" in result.stderr


def test_a_wrong_number_of_processes_is_named(paths):
    with pytest.raises(subprocess.CalledProcessError) as failed:
        dry_run(NPROC_PER_NODE="two", **paths)
    assert failed.value.returncode == 2
    assert "error: NPROC_PER_NODE is two: give the number of processes" in failed.value.stderr


def test_missing_variable_is_named(paths):
    del paths["DATASET"]
    with pytest.raises(subprocess.CalledProcessError) as refused:
        dry_run(**paths)
    assert refused.value.returncode == 2
    assert "DATASET is not set; set it to the folder" in refused.value.stderr


@pytest.mark.parametrize("port", ["0", "66000", "http"])
def test_port_that_nodes_cannot_share_is_refused(port, paths):
    slurm = {"SLURM_JOB_ID": 77, "SLURM_NNODES": 2, "HEAD_NODE": "node-a"}
    with pytest.raises(subprocess.CalledProcessError) as refused:
        dry_run(MASTER_PORT=port, **slurm, **paths)
    assert refused.value.returncode == 2
    assert f"MASTER_PORT is {port}; all nodes meet at one port" in refused.value.stderr


FAKE_SRUN = """#!{python}
# Two "nodes" on this machine: each runs the command, with a log of its own. Like the real one
# (test_launch_slurm.py), it sends SIGUSR1 to both, and kills both when it gets SIGTERM.
import os, signal, subprocess, sys
start = next(i for i, word in enumerate(sys.argv) if i and not word.startswith("--"))
flags = dict(word[2:].split("=") for word in sys.argv[1:start])  # a flag's value stands behind "="
pattern, command = flags["output"], sys.argv[start:]
children = []
for node in range(int(flags["nodes"])):
    name = f"node{{node}}"
    path = pattern.replace("%j", os.environ["SLURM_JOB_ID"]).replace("%N", name)
    environment = os.environ | {{"SLURM_NODEID": str(node), "SLURMD_NODENAME": name}}
    log = open(path, "a")
    children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
signal.signal(signal.SIGUSR1, lambda number, _: [child.send_signal(number) for child in children])
signal.signal(signal.SIGTERM, lambda *_: [child.kill() for child in children])
sys.exit(max(abs(child.wait()) for child in children))
"""
FAKE_SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo localhost; else echo "$@" >>"$FAKE_SLURM/requeued"; fi
"""


@pytest.fixture
def slurm(tmp_path: Path, tiny_dataset: Path):
    """Start the script as `sbatch` would, on two nodes that are this machine."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (
        ("srun", FAKE_SRUN.format(python=sys.executable)),
        ("scontrol", FAKE_SCONTROL),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "batch_script").write_text(SCRIPT.read_text())  # SLURM runs a copy

    jobs = []

    def start(checkpoint: Path, output: Path, *argv: object) -> subprocess.Popen[str]:
        environment = os.environ | {
            "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "FAKE_SLURM": str(folder),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            "NPROC_PER_NODE": "1",
            "RECIPE": "tiny_debug",
            "CHECKPOINT": str(checkpoint),
            "DATASET": str(tiny_dataset),
            "OUTPUT": str(output),
            "OMP_NUM_THREADS": "1",
        }
        job = subprocess.Popen(
            ["bash", folder / "batch_script", *map(str, argv)],
            env=environment,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        jobs.append(job)
        return job

    yield start
    for job in jobs:
        if job.poll() is None:  # the test has failed: both nodes go with it
            os.killpg(job.pid, signal.SIGKILL)


def wait_for(
    condition: Callable[[], bool], job: subprocess.Popen[str], seconds: float = 200
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline, f"nothing after {seconds} s"
        time.sleep(0.2)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def losses(output: Path) -> list[dict]:
    log = output / "loss.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.slow
def test_time_limit_saves_queues_again_and_goes_on(slurm, tmp_path, tiny_dataset, run_job):
    small = ["--hidden-size", 64, "--kv-channels", 16, "--ffn-hidden-size", 128, "--num-layers", 2]
    small += ["--padded-vocab-size", 512, "--seq-length", 128, "--global-batch-size", 2]
    small += ["--context-parallel-size", 2, "--allow-repeat", "--override-opt-param-scheduler"]
    first = ["-m", "megatron_long.pretrain", "--recipe", "tiny_debug", "--dataset", tiny_dataset]
    first += [*small[:-3], "1", "--allow-repeat", "--train-iters", 1, "--save", tmp_path / "start"]
    run_job(1, first)
    output = tmp_path / "output"
    job = slurm(tmp_path / "start", output, *small, "--train-iters", 100_000)
    wait_for(lambda: len(losses(output)) >= 2, job)
    job.send_signal(signal.SIGUSR1)  # to the shell alone, as --signal=B:USR1@300 does
    text, _ = job.communicate(timeout=600)
    logs = sorted(path.name for path in (output / "logs").iterdir())
    assert logs == [f"{os.getpid()}-node0.log", f"{os.getpid()}-node1.log", "start.log"]
    said = "".join(path.read_text() for path in (output / "logs").iterdir())
    assert "time is up, queued again" in text, text + said
    requeued = (tmp_path / "slurm" / "requeued").read_text().split()
    assert requeued == ["requeue", str(os.getpid())]
    saved = int((output / "latest_checkpointed_iteration.txt").read_text())
    steps = len(losses(output))
    assert saved == steps >= 2, said

    again = slurm(tmp_path / "start", output, *small, "--train-iters", saved + 2)
    text, _ = again.communicate(timeout=600)
    assert again.returncode == 0, text
    assert [record["iteration"] for record in losses(output)] == list(range(1, saved + 3))
    assert int((output / "latest_checkpointed_iteration.txt").read_text()) == saved + 2
    assert len((tmp_path / "slurm" / "requeued").read_text().split()) == 2  # a finished run is not
    size = (output / "logs" / f"{os.getpid()}-node0.log").stat().st_size
    assert size > 0


@pytest.mark.slow
def test_time_limit_ends_a_job_that_waits_for_a_node(slurm, tmp_path, paths):
    """A node that never comes: the launcher waits for it, and no rank runs that could take the signal."""
    lost = (tmp_path / "slurm" / "srun").read_text().replace("range(int(", "range(-1 + int(")
    (tmp_path / "slurm" / "srun").write_text(lost)
    output = paths["OUTPUT"]
    job = slurm(paths["CHECKPOINT"], output, "--allow-repeat")
    log = output / "logs" / f"{os.getpid()}-node0.log"
    wait_for(lambda: answers(20_000 + os.getpid() % 12_000), job)
    job.send_signal(signal.SIGUSR1)
    text, _ = job.communicate(timeout=600)
    assert job.returncode == 0, text
    assert "SIGUSR1 received while no rank was running" in log.read_text()
    assert "queued again" in text
    assert (tmp_path / "slurm" / "requeued").exists()


@pytest.mark.slow
def test_failed_job_is_not_queued_again(slurm, tmp_path, paths):
    job = slurm(paths["CHECKPOINT"], tmp_path / "output", "--context-parallel-size", 3)
    text, _ = job.communicate(timeout=600)
    assert job.returncode == 2
    assert "cannot hold whole replicas" in " ".join(text.split())
    assert not (tmp_path / "slurm" / "requeued").exists()
