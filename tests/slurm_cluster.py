"""Two SLURM nodes on this machine, as its user: SLURM's own daemons, with a network of their own ports."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIGURATION = """\
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MailProg=/bin/true
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 Gres=gpu:1
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 Gres=gpu:1
PartitionName=gpu Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """What keeps a cluster from being started: nobody asked for daemons, or something is not there."""
    if os.environ.get("SLURM_TESTS") != "1":
        return "SLURM_TESTS=1 is not set: starts munged, slurmctld and slurmd, 8 minutes"
    lacks = [name for name in DAEMONS if shutil.which(name) is None]
    if lacks:
        return f"no {', '.join(lacks)}: apt install slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd needs root"


@contextlib.contextmanager
def start(folder: Path) -> Iterator[dict[str, str]]:
    """Give the environment in which SLURM's commands talk to the cluster."""
    for name in ("state", "node1", "node2"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname()
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(folder=folder, host=host, ports=free_ports(3))
    )
    (folder / "gres.conf").write_text("Name=gpu Count=1 File=/dev/null\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    names = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = [f"--{flag}={folder}/munge.{name}" for flag, name in names.items()]
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "node1"],
        ["slurmd", "-D", "-N", "node2"],
    ]
    daemons = []
    try:
        for command in commands:
            log = (folder / "daemons.log").open("a")
            daemons.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
            )
            if command[0] == "munged":
                _wait(lambda: (folder / "munge.socket").exists(), folder)
        _wait(lambda: ask(environment, "sinfo", "-h", "-o", "%T %D") == "idle 2", folder)
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


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens at."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait(condition, folder: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        logs = [path.read_text(errors="replace")[-1500:] for path in sorted(folder.glob("*.log"))]
        assert time.monotonic() < deadline, "\n".join(logs)
        time.sleep(0.3)
