"""Runs Python programs by forking from a process that has imported torch, Megatron and transformers once.

Each line of standard input is a job, `{"processes", "words", "folder", "environment", "cwd", "timeout"}`,
whose words are those after `python`: `-m MODULE ...`, `-c CODE ...` or `FILE ...`. Its answer is a line
with the exit status, None where the time was over; what it wrote lies in FOLDER/stdout and FOLDER/stderr.
Several processes get the variables of torchrun, and end together when one of them fails.
"""

import atexit
import contextlib
import importlib
import json
import os
import pkgutil
import runpy
import signal
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path
from typing import Any, NoReturn

TERMINATION_SECONDS = 30
"""Between the two signals to the ranks of a job that has failed, as torchrun waits."""
ALSO = (
    "megatron.training.training",
    "megatron.core.models.gpt.gpt_layer_specs",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
)


def main() -> None:
    """Serve jobs until the input ends."""
    import_all()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    jobs = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for line in jobs:
        print(json.dumps(run_job(json.loads(line))), file=answers)


def import_all() -> None:
    """Import what programs need; what is missing on this machine they tell themselves."""
    from megatron_long.engine import host_backend

    host_backend.install()
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    import megatron_long

    ours = pkgutil.walk_packages(megatron_long.__path__, "megatron_long.")
    for name in (*ALSO, *(found.name for found in ours)):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    queue = filesystem_async.get_write_results_queue  # spawning one imports torch once more a rank
    filesystem_async.get_write_results_queue = lambda mode="spawn": queue("fork")


def run_job(job: dict[str, Any]) -> int | None:
    """Start the processes of a job, wait for them, give the exit status."""
    ranks = [rank_variables(job, rank) for rank in range(job["processes"])]
    running = {start(job, variables) for variables in ranks}
    started, failed, deadline = set(running), 0, time.monotonic() + job["timeout"]
    killed = float("inf")
    try:
        while running:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended in running:
                running.remove(ended)
                code = os.waitstatus_to_exitcode(status)
                if code and not failed:
                    failed, killed = code, time.monotonic() + TERMINATION_SECONDS
                    signal_all(running, signal.SIGTERM)
            elif time.monotonic() > deadline:
                return None
            elif time.monotonic() > killed:
                signal_all(running, signal.SIGKILL)
            else:
                time.sleep(0.01)
    finally:
        signal_all(started, signal.SIGKILL)  # helpers of a process that was killed
        for process in running:
            os.waitpid(process, 0)
    return 1 if failed and job["processes"] > 1 else failed


def signal_all(processes: set[int], number: int) -> None:
    """Signal the groups of these processes."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, number)


def rank_variables(job: dict[str, Any], rank: int) -> dict[str, str]:
    """The environment of one process: torchrun's, where there are several."""
    if job["processes"] == 1:
        return {}
    if rank == 0:
        from tests.ports import free_ports

        (job["port"],), job["id"] = free_ports(1), uuid.uuid4().hex
    count, own = str(job["processes"]), Path(job["folder"], "attempt_0", str(rank))
    own.mkdir(parents=True)
    return {
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK", "ROLE_RANK")},
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), count),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_NAME": "default",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(job["port"]),
        "TORCHELASTIC_RUN_ID": job["id"],
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_ERROR_FILE": str(own / "error.json"),
    }


def start(job: dict[str, Any], variables: dict[str, str]) -> int:
    """Fork one process and give its id."""
    child = os.fork()
    if child:
        with contextlib.suppress(OSError):  # it has done so itself, or has ended
            os.setpgid(child, child)
        return child
    os.setpgid(0, 0)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(Path(job["folder"], name), flags), descriptor)
    be(job, variables)


def be(job: dict[str, Any], variables: dict[str, str]) -> NoReturn:
    """Run the program of a job in this process, and end it."""
    status = 1
    try:
        os.environ.clear()
        os.environ.update(job["environment"] | variables)
        os.chdir(job["cwd"])
        status = run_program(job["words"])
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def run_program(words: list[str]) -> int:
    """Run what follows `python` on a command line; give the exit status."""
    import numpy as np

    np.random.seed()  # noqa: NPY002  # a fork has the state of its server
    try:
        if words[0] == "-m":
            sys.argv, sys.path[0] = words[1:], os.getcwd()
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *words[2:]], os.getcwd()
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = list(words), str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return int(ended.code or 0)
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.path.insert(0, "")  # the place of the programs' folder
    main()
