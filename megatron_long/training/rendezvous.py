"""What the processes of a job agree on before Megatron starts, through the store that starts them."""

import functools
import itertools
import json
import os
import time
from datetime import timedelta
from typing import Any

TIMEOUT_S = 1800.0
CONNECT_TIMEOUT_S = 30.0
_calls = itertools.count()


def share() -> tuple[int, int]:
    """This process's number and how many there are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def agree(findings: list[str]) -> list[str]:
    """Give every process what all of them have found; waits for the slowest.

    Only those with findings send them, so that a job of thousands costs the store two counters.
    """
    rank, world_size = share()
    if world_size == 1:
        return findings
    store, number = _store(), next(_calls)
    if findings:
        store.set(f"{number}/{store.add(f'{number}/found', 1)}", json.dumps(findings))
    store.add(f"{number}/done", 1)
    deadline = time.monotonic() + TIMEOUT_S
    while store.add(f"{number}/done", 0) < world_size:
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {rank} waited {TIMEOUT_S:.0f} s for the others of its job")
        time.sleep(0.02)
    total = store.add(f"{number}/found", 0)
    shares = [json.loads(store.get(f"{number}/{index}")) for index in range(1, total + 1)]
    store.add(f"{number}/read", 1)
    while rank == 0 and store.add(f"{number}/read", 0) < world_size:
        time.sleep(0.02)  # it may host the store, and leave at once with a refusal
    return [finding for share in shares for finding in share]


def connect(name: str) -> Any:
    """Give a connection of its own to the job's store, for a thread: an operation that waits keeps the others
    of a connection waiting.

    Args:
        name: Before every key.
    """
    from torch import distributed

    store = distributed.PrefixStore(name, _store()).clone()
    store.set_timeout(timedelta(seconds=CONNECT_TIMEOUT_S))
    return store


@functools.cache
def _store() -> Any:
    """The job's store; kept, for the process that hosts it must not let it go."""
    from torch import distributed

    store, _, _ = next(distributed.rendezvous("env://", timeout=timedelta(seconds=TIMEOUT_S)))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return distributed.PrefixStore(f"megatron_long/{attempt}", store)
