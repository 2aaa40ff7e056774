"""A signal to one rank before the first step ends those of other nodes too; here a node is a launcher."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launched import REPOSITORY, end_all, wait_until
from tests.ports import free_ports

RANK = """
import os, pathlib, sys, time
from datetime import timedelta
from megatron_long.job import leaving, rendezvous, signals
signals.leave_before_training()
folder, connects = sys.argv[1], sys.argv[2] == "connected"
if connects:
    leaving.leave_together(signals.leave_with_others)
def tell(name):
    path = pathlib.Path(folder, name)
    path.with_suffix(".new").write_text(str(os.getpid()))
    path.with_suffix(".new").rename(path)
tell(os.environ["RANK"])
if os.environ["RANK"] != "1":
    leaving.leave_together(signals.leave_with_others)  # the others reach this, however late
    rendezvous.connect("other").wait(["never"], timedelta(seconds=600))  # in native code
time.sleep(600)
"""


@pytest.mark.parametrize("state", ["connected", "importing"])
def test_ranks_of_other_nodes_leave_too(state: str, tmp_path: Path):
    """The other three wait in native code for what never comes, as for a collective."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "megatron_long.launch", "--nnodes=2", "--nproc-per-node=2"]
    command += ["--master-addr=127.0.0.1", f"--master-port={free_ports(1)[0]}"]
    launchers = [
        subprocess.Popen(
            [*command, f"--node-rank={node}", script, tmp_path, state],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    try:
        ranks = [tmp_path / str(rank) for rank in range(4)]
        wait_until(lambda: all(path.exists() for path in ranks))
        os.kill(int(ranks[1].read_text()), signal.SIGTERM)
        told = [launcher.communicate(timeout=600)[1] for launcher in launchers]
    finally:
        for launcher in launchers:
            end_all(launcher)
    assert [launcher.returncode for launcher in launchers] == [0, 0], told
    assert "SIGTERM received before the first step" in told[0]
    assert "Traceback" not in "".join(told)
