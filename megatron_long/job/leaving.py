"""Leaving together before the first step: a rank that a signal ends tells those of all nodes.

They would wait for it until a timeout of half an hour, mostly in native code, where no signal handler of
Python's runs: a thread ends them.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from megatron_long.job import rendezvous

NAME, KEY = "leaving", "left"
_stores: list[Any] = []


def leave_together(leave: Callable[[], None]) -> None:
    """Call `leave` in a thread as soon as another process of the job tells that it leaves (`tell_others`).

    Each process of a job calls it when it knows its number; waits for the store. Only where a launcher keeps
    the store: one that a rank keeps would end with it.
    """
    if not _has_launcher_store() or rendezvous.share()[1] == 1 or _stores:
        return
    waiting = rendezvous.connect(NAME)
    _stores.append(rendezvous.connect(NAME))

    def wait() -> None:
        with contextlib.suppress(Exception):  # the store has gone, as at the end of the job
            waiting.wait([KEY], timedelta(days=365))
            if _stores:  # it is not this one that has told
                leave()

    threading.Thread(target=wait, name="leaving", daemon=True).start()


def tell_others() -> None:
    """Tell the job that this process leaves before the first step; for its signal handler.

    Before `leave_together`, as while torch is imported, another program takes the place of this process for
    some seconds to tell the other nodes, and ends with status 0: half imported modules cannot.
    """
    if _stores:
        with contextlib.suppress(Exception):
            _stores.pop().set(KEY, "")
    elif _has_launcher_store() and _has_other_nodes():
        os.execv(sys.executable, [sys.executable, "-m", __name__])


def _has_launcher_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _has_other_nodes() -> bool:
    return rendezvous.share()[1] > int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


if __name__ == "__main__":
    with contextlib.suppress(Exception):
        rendezvous.connect(NAME).set(KEY, "")
