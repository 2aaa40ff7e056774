"""SLURM nodes on this machine, as its user: SLURM's own daemons, with a network of their own ports."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
PARTITION = "all"
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MailProg=/bin/true
GresTypes=gpu
PartitionName={partition} Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=8000"
)


class NotStarted(RuntimeError):
    """The daemons do not come up here; what they log is the message."""


def missing() -> str | None:
    """What keeps a cluster from being started."""
    lacks = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacks:
        return f"no {', '.join(lacks)}: apt install slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd needs root"


@contextlib.contextmanager
def start(
    folder: Path, *, num_nodes: int = 1, cpus: int = 1, gpus: int = 0
) -> Iterator[dict[str, str]]:
    """Give the environment in which SLURM's commands talk to the cluster.

    Args:
        folder: Where the daemons keep their files.
        cpus: Of each node; SLURM believes it.
        gpus: Likewise, 0 or 1; its device is /dev/null.
    Raises: NotStarted: the nodes are not there in time.
    """
    nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
    for name in ("state", *nodes):
        (folder / name).mkdir(parents=True)
    _configure(folder, nodes, cpus, gpus)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    names = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = [f"--{flag}={folder}/munge.{name}" for flag, name in names.items()]
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}", *munge],
        ["slurmctld", "-D"],
        *(["slurmd", "-D", "-N", name] for name in nodes),
    ]
    daemons = []
    try:
        with (folder / "daemons.log").open("a") as log:
            for command in commands:
                daemons.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
                )
                if command[0] == "munged":
                    _wait((folder / "munge.socket").exists, folder)
        idle = f"idle {num_nodes}"
        _wait(lambda: ask(environment, "sinfo", "-h", "-o", "%T %D") == idle, folder)
        yield environment
    finally:
        subprocess.run(["scancel", "--user", "root"], env=environment, check=False)
        time.sleep(1)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            daemon.wait(60)


def ask(environment: dict[str, str], *command: str) -> str:
    """What a command of SLURM prints."""
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    ).stdout.strip()


def _configure(folder: Path, nodes: list[str], cpus: int, gpus: int) -> None:
    host, (port, *ports) = socket.gethostname(), free_ports(1 + len(nodes))
    text = CONFIGURATION.format(folder=folder, host=host, port=port, partition=PARTITION)
    for name, own in zip(nodes, ports, strict=True):
        text += NODE.format(name=name, host=host, port=own, cpus=cpus)
        text += f" Gres=gpu:{gpus}\n" if gpus else "\n"
    (folder / "slurm.conf").write_text(text)
    if gpus:
        (folder / "gres.conf").write_text(f"Name=gpu Count={gpus} File=/dev/null\n")


def _wait(condition: Callable[[], bool], folder: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = sorted(folder.glob("*.log"))
            raise NotStarted("\n".join(path.read_text(errors="replace")[-1500:] for path in logs))
        time.sleep(0.3)
