"""A job of processes that have a watchdog and nothing else: `watchdog_job.py FOLDER PART...`.

Each process plays a part of `PARTS`; the last line says how they ended. The store is the launcher's, as under
torchrun, or that of rank 0 if the first part is named `host:PART`.
"""

import contextlib
import ctypes
import functools
import json
import os
import select
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch.distributed

from megatron_long.job import rendezvous, watchdog
from tests.ports import free_ports

PR_SET_PDEATHSIG = 1
TIMEOUT_S = 1.0
watchdog.GRACE_S, watchdog.ANSWER_S, watchdog.LAST_S = 6.0, 6.0, 6.0
LONG_S = 120.0


def beat_until_end(dog, others) -> None:
    """Beat, until another process has ended: what waits for it in a collective then fails."""
    for _ in range(int(LONG_S / 0.1)):
        if select.select(others, [], [], 0.1)[0]:
            raise RuntimeError("Connection closed by peer")
        dog.beat()


def stop_in_kernel(dog, others) -> None:
    """Stand still, as by `kill -STOP`."""
    os.kill(os.getpid(), signal.SIGSTOP)


def die(dog, others) -> None:
    """Be killed, as for want of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def beat_on(dog, others) -> None:
    """Train for some multiples of the time-out."""
    for _ in range(60):
        time.sleep(0.1)
        dog.beat()


PARTS = {
    "train": beat_until_end,
    "train alone": beat_on,
    "hang": lambda dog, others: time.sleep(LONG_S),
    "native": lambda dog, others: ctypes.PyDLL(None).sleep(int(LONG_S)),
    "stand still": stop_in_kernel,
    "die": die,
    "leave": lambda dog, others: None,
}


def run_rank(rank: int, part: str, others: list[int], folder: Path) -> None:
    """Play a part to its end."""
    os.environ["RANK"] = str(rank)
    connect = functools.partial(rendezvous.connect, "watchdog")
    rendezvous.agree([])  # all have a store
    dog = watchdog.Watchdog(TIMEOUT_S, folder, rank, connect)
    dog.end_step()
    try:
        time.sleep(0.5)
        dog.beat()
        PARTS[part](dog, others)
    finally:
        dog.stop()


def start_store() -> int:
    """Start the launcher's store and give its port.

    In a process of its own: a fork of one with the store's threads may wait for ever for a lock of theirs.
    """
    read, write = os.pipe()
    if not os.fork():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        store = torch.distributed.TCPStore("localhost", 0, None, True, wait_for_workers=False)
        os.write(write, str(store.port).encode())
        signal.pause()
    os.close(write)
    return int(os.read(read, 16))


def main() -> None:
    """Run the job, and tell how each process ended; those that stand still are killed last."""
    folder, parts = Path(sys.argv[1]), sys.argv[2:]
    is_host = parts[0].startswith("host:")
    parts[0] = parts[0].removeprefix("host:")
    port = free_ports(1)[0] if is_host else start_store()
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(len(parts)), "TORCHELASTIC_USE_AGENT_STORE": str(not is_host)}
    pipes = [os.pipe() for _ in parts]  # each process holds the end of its own open
    children = []
    for rank, part in enumerate(parts):
        children.append(os.fork())
        if not children[-1]:
            for other, (_, end) in enumerate(pipes):
                if other != rank:
                    os.close(end)
            try:
                run_rank(rank, part, [r for n, (r, _) in enumerate(pipes) if n != rank], folder)
                os._exit(0)
            finally:
                os._exit(9)
    statuses = dict.fromkeys(children)
    for part, child in zip(parts, children, strict=True):
        if part != "stand still":
            statuses[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for child, status in statuses.items():
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    print(json.dumps(list(statuses.values())))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
