"""Agreement of the processes of a job before Megatron starts, through torchrun's store."""

import functools
import itertools
import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from megatron_long.errors import ConfigError, DataError, UserError

TIMEOUT_S = 1800.0
CONNECT_TIMEOUT_S = 30.0
_calls = itertools.count()


def share() -> tuple[int, int]:
    """Rank of this process, and the number of processes."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process is the first of its job: the one that prints and decides for all."""
    return share()[0] == 0


def agree(findings: list[str]) -> list[str]:
    """Return to every process what all of them found; waits for the slowest.

    Only processes with findings send them, so a job of thousands costs the store two counters.
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
            raise TimeoutError(
                f"rank {rank} waited {TIMEOUT_S:.0f} s for the other ranks of its job"
            )
        time.sleep(0.02)
    total = store.add(f"{number}/found", 0)
    shares = [json.loads(store.get(f"{number}/{index}")) for index in range(1, total + 1)]
    store.add(f"{number}/read", 1)
    while rank == 0 and store.add(f"{number}/read", 0) < world_size:
        time.sleep(0.02)  # it may host the store, and exit at once with an error
    return [finding for share in shares for finding in share]


def from_first(compute: Callable[[], list[str]]) -> list[str]:
    """Return to every process what the first one computes, or raise its error.

    Raises: UserError: of any kind, on every process, with the message of the first.
    """
    found: list[str] = []
    if share()[0] == 0:
        try:
            found = ["", "", *compute()]
        except UserError as error:
            found = [type(error).__name__, str(error)]
    name, refusal, *lines = agree(found)
    if name:
        raise {kind.__name__: kind for kind in (ConfigError, DataError)}.get(name, UserError)(
            refusal
        )
    return lines


def see_alike(look: Callable[[], str], rounds: int = 90) -> None:
    """Wait until every process sees what the first one sees: shared file systems show changes late.

    NFS keeps a folder's listing for up to a minute. Processes that see other files would start from other
    checkpoints, or not find theirs.

    Args:
        look: Looks again at each call, and returns what it sees.
        rounds: How often to look, once a second.
    Raises: DataError: on every process, if they still differ; names one that does.
    """
    for _ in range(rounds):
        seen = look()
        (expected,) = from_first(lambda: [seen])  # noqa: B023
        own = f"rank {share()[0]} on {socket.gethostname()} sees {seen}"
        differing = agree([] if seen == expected else [own])
        if not differing:
            return
        time.sleep(1)
    raise DataError(
        f"the processes of this job do not see the same files: the first sees {expected}, and "
        f"{differing[0]} ({len(differing)} differ). The folder must be on a file system that every node "
        "shares; start again when they agree"
    )


def connect(name: str) -> Any:
    """Return a separate connection to the job's store, for a thread: a waiting operation blocks the others
    of a connection.

    Args:
        name: Prefix of every key.
    """
    from torch import distributed

    store = distributed.PrefixStore(name, _store()).clone()  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=CONNECT_TIMEOUT_S))
    return store


@functools.cache
def _store() -> Any:
    """The job's store; kept, because the process that hosts it must not release it."""
    from torch import distributed

    store, _, _ = next(distributed.rendezvous("env://", timeout=timedelta(seconds=TIMEOUT_S)))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return distributed.PrefixStore(f"megatron_long/{attempt}", store)
