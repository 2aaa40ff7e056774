"""Runs training jobs on the host backend by forking from a process that has imported everything once.

Each line of standard input is a job, `{"ranks", "argv", "log", "faults"}`; it is answered by a line with
the ids of its processes and, at their end, one with their exit statuses. A rank runs
`megatron_long.pretrain.main`, as torchrun's processes do, with its output in LOG.RANK.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

LONELY_SECONDS = 600
"""That a rank may live when another one has failed: a watchdog of its own ends it long before."""


def main() -> None:
    """Serve jobs until the input ends."""
    from megatron_long.engine import host_backend

    host_backend.install()
    import megatron.training.training  # noqa: F401
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_long import pretrain  # noqa: F401
    from megatron_long.engine import loop, run, state_tensors  # noqa: F401
    from megatron_long.training import batch, datasets, loss  # noqa: F401
    from megatron_long.training.callbacks import guarding  # noqa: F401
    from tests.ports import free_ports

    queue = filesystem_async.get_write_results_queue  # spawning one imports torch once more a rank
    filesystem_async.get_write_results_queue = lambda mode="spawn": queue("fork")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        job = json.loads(line)
        (port,) = free_ports(1)
        children = [start_rank(rank, port, job) for rank in range(job["ranks"])]
        print(json.dumps(children), file=answers)
        try:
            statuses = wait_for(children)
        finally:
            for child in children:  # a rank that was killed leaves the helper of its save behind
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
        print(json.dumps(statuses), file=answers)


def wait_for(children: list[int]) -> list[int]:
    """Wait for processes and give their exit statuses; one that waits for a failed one too long is killed."""
    statuses: dict[int, int] = {}
    deadline = float("inf")
    while len(statuses) < len(children):
        for child in children:
            ended, status = (0, 0) if child in statuses else os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
                if statuses[child]:
                    deadline = min(deadline, time.monotonic() + LONELY_SECONDS)
            elif child not in statuses and time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[child] for child in children]


def start_rank(rank: int, port: int, job: dict) -> int:
    """Fork one process of a job and give its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    os.setpgid(0, 0)
    try:
        log = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost"}
        os.environ |= {"WORLD_SIZE": str(job["ranks"]), "MASTER_PORT": str(port)}
        status = train(job["argv"], job["faults"], rank)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for helper in multiprocessing.active_children():  # the queue of a save, which would stay
            helper.kill()
        os._exit(status)


def train(argv: list[str], faults: list[dict], rank: int) -> int:
    """Train as the command line does; give the exit status."""
    import traceback

    from megatron_long import pretrain
    from megatron_long.cli import run_tool

    for fault in faults:
        if rank in fault["ranks"]:
            FAULTS[fault["kind"]](fault)
    try:
        return run_tool(lambda: pretrain.main(argv))
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1


def spoil_loss(fault: dict) -> None:
    """Multiply the loss of some steps; the gradients follow."""
    import torch

    from megatron_long.training import batch

    stock = batch.loss_function

    def loss_function(loss_mask, num_padding, losses, on_loss=None):
        if present_step() in fault["steps"] and on_loss is not None:
            losses = losses * torch.tensor(float(fault["factor"]))
        return stock(loss_mask, num_padding, losses, on_loss)

    batch.loss_function = loss_function


def spoil_gradient(fault: dict) -> None:
    """Put an Inf into one gradient of some steps, the loss being right."""
    from megatron.core.distributed import DistributedDataParallel

    stock = DistributedDataParallel.__init__

    def spoil(gradient):
        if present_step() in fault["steps"]:
            gradient = gradient.clone()
            gradient.view(-1)[0] = float("inf")
        return gradient

    def build(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        list(self.parameters())[-1].register_hook(spoil)

    DistributedDataParallel.__init__ = build


def after_step(action) -> None:
    """Call `action(model, optimizer)` after each step."""
    import functools
    import importlib

    training = importlib.import_module("megatron.training.training")
    stock = training.train_step

    @functools.wraps(stock)
    def train_step(forward_step_func, data_iterator, model, optimizer, *args, **kwargs):
        result = stock(forward_step_func, data_iterator, model, optimizer, *args, **kwargs)
        action(model, optimizer)
        return result

    training.train_step = train_step


def spoil_weights(fault: dict) -> None:
    """Let the optimizer itself write a NaN, as a broken device would."""

    def spoil(model, optimizer):
        if present_step() in fault["steps"]:
            next(model[0].parameters()).data.view(-1)[5] = float("nan")

    after_step(spoil)


def hash_state(fault: dict) -> None:
    """Write down a hash of a rank's main weights and optimizer after each step.

    The model's weights are left out: where their gathering overlaps the next step, they lag behind.
    """
    import hashlib

    from megatron_long.engine.state_tensors import state_tensors

    def write(model, optimizer):
        digest = hashlib.sha256()
        for tensor in state_tensors([], optimizer):
            digest.update(tensor.detach().contiguous().numpy().tobytes())
        with open(fault["path"], "a") as file:
            file.write(digest.hexdigest() + "\n")

    after_step(write)


def sleep_in_step(fault: dict) -> None:
    """Stop answering in one step: in Python, or in native code that holds Python's lock."""
    import ctypes

    from megatron_long.training import batch

    stock = batch.loss_function

    def loss_function(*args, **kwargs):
        if present_step() in fault["steps"]:
            if "path" in fault:
                Path(fault["path"]).touch()
            if fault["native"]:
                ctypes.PyDLL(None).sleep(600)
            time.sleep(600)
        return stock(*args, **kwargs)

    batch.loss_function = loss_function


def stock_optimizer_format(fault: dict) -> None:
    """Save and load the optimizer as Megatron does by itself."""
    from megatron_long.engine import megatron_adapter

    megatron_adapter.save_own_shards = lambda: None


def trace_windows(fault: dict) -> None:
    """Write down which windows the training set is asked for."""
    from megatron_long.dataset.packed_dataset import PackedDataset

    stock = PackedDataset.__getitem__

    def read(self, index):
        with open(fault["path"], "a") as file:
            file.write(f"{index}\n")
        return stock(self, index)

    PackedDataset.__getitem__ = read


def ring_clock(fault: dict) -> None:
    """Let the time of a save be over on this rank after some steps; the clock itself never is."""
    from megatron_long.training.callbacks.save_clock import SaveClock

    SaveClock.is_due = lambda self: present_step() in fault["steps"]


def kill_at_write(fault: dict) -> None:
    """Kill this rank and its helpers when a file of this name would be opened for writing."""

    def kill() -> None:
        os.killpg(0, signal.SIGKILL)

    before_write(fault["name"], kill)


def fill_disk(fault: dict) -> None:
    """Let files whose names end so find no room; the last tries of a save come without waits."""
    import errno

    from megatron_long.checkpoint import saving

    def refuse() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before_write(fault["name"], refuse)
    saving.LAST_TRIES_S = (0.0,) * 3


def before_write(name: str, action) -> None:
    """Act before each opening for writing of files whose names end so, here and in forked helpers."""

    def hook(event: str, values: tuple) -> None:
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        if event == "open" and str(values[0]).endswith(name) and values[2] & writing:
            action()

    sys.addaudithook(hook)


def present_step() -> int:
    """The step in work, from 1."""
    from megatron.training.global_vars import get_args

    return get_args().curr_iteration + 1


def rounded_weights(_: dict) -> None:
    """Take every checkpoint for one of a run with FP8 parameters, which need a GPU."""
    from megatron_long.checkpoint import megatron_folder

    megatron_folder.holds_rounded_weights = lambda state: True


def listen(fault: dict) -> None:
    """Add a callback behind those of the run: it writes down each event, and acts at some.

    `path` gets a line `event step` for each; `answers` gives, by such a line, what the event returns
    (a list is an `End`'s status and snapshot), `raises` is the line at which it raises.
    """
    from megatron_long.engine import run
    from megatron_long.engine.callback import Callback, End

    def event(name: str):
        def act(self, step=None, *_):
            line = f"{name} {step.iteration}" if step else name
            with open(f"{fault['path']}.{os.environ['RANK']}", "a") as file:
                file.write(line + "\n")
            if line == fault.get("raises"):
                raise RuntimeError("a callback is broken")
            answer = fault.get("answers", {}).get(line)
            if isinstance(answer, list):
                status, snapshot = answer
                return End(status, Path(snapshot) if snapshot else None)
            return answer

        return act

    names = [name for name in vars(Callback) if not name.startswith("_")]
    listener = type("Listener", (Callback,), {name: event(name) for name in names})
    stock = run.run_training

    def run_training(*positional, callbacks, **named):
        stock(*positional, callbacks=[*callbacks, listener()], **named)

    run.run_training = run_training


def note_changes(fault: dict) -> None:
    """Write down which functions of Megatron are others, when training begins, than they are now."""
    from megatron_long.engine.loop import Loop

    before, stock = megatron_functions(), Loop.train

    def train(self, *positional, **named):
        changed = [key for key, value in before.items() if find(*key) is not value]
        Path(fault["path"]).write_text(json.dumps(sorted(changed)))
        return stock(self, *positional, **named)

    Loop.train = train


def find(module: str, name: str) -> object:
    """A function of a module, or a method of one of its classes, as `Class.method`."""
    content = sys.modules[module]
    owner, _, method = name.rpartition(".")
    return vars(getattr(content, owner) if owner else content)[method]


def megatron_functions() -> dict[tuple[str, str], object]:
    """Functions and methods of the modules that are imported, by module and name."""
    found: dict[tuple[str, str], object] = {}
    for module, content in list(sys.modules.items()):
        if not module.startswith("megatron.") or content is None:
            continue
        for name, value in list(vars(content).items()):
            if callable(value) and getattr(value, "__module__", None) == module:
                found[module, name] = value
                if isinstance(value, type):
                    own = {k: v for k, v in vars(value).items() if callable(v)}
                    found |= {(module, f"{name}.{k}"): v for k, v in own.items()}
    return found


FAULTS = {
    "loss": spoil_loss,
    "gradient": spoil_gradient,
    "weights": spoil_weights,
    "hang": sleep_in_step,
    "hash": hash_state,
    "stock-optimizer-format": stock_optimizer_format,
    "trace": trace_windows,
    "clock": ring_clock,
    "rounded-weights": rounded_weights,
    "kill-at-write": kill_at_write,
    "full-disk": fill_disk,
    "listen": listen,
    "changes": note_changes,
}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
