"""What is changed inside Megatron's running loop: how it saves, and what follows a step.

The loop calls its own functions by their names in its modules; each `install_*` replaces some of them by one
of ours. `megatron_adapter` and `loading_hooks` change the rest of `megatron.training`; a contract for each
symbol is in `tests/engine/test_megatron_adapter.py`.
"""

import atexit
import functools
import importlib
import inspect
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_long.checkpoint.saving import CheckpointKeeper, ErrorKeepingStream
from megatron_long.cli import USER_ERROR_STATUS
from megatron_long.engine.step_guard import FAULT_STATUS, StepGuard
from megatron_long.job import signals
from megatron_long.job.side_output import SurvivingWriter
from megatron_long.job.watchdog import LONG_PHASE, Watchdog

CHANGED_SYMBOLS = {
    "megatron.training.training": (
        "training_log",
        "train",
        "train_step",
        "save_checkpoint",
        "save_checkpoint_and_time",
        "checkpoint_and_decide_exit",
        "maybe_finalize_async_save",
        "post_training_step_callbacks",
    ),
    "megatron.training.checkpointing": ("ensure_directory_exists",),
    "megatron.core.dist_checkpointing": ("save",),
    "megatron.core.dist_checkpointing.serialization": ("save_config",),
    "megatron.core.dist_checkpointing.strategies.filesystem_async": (
        "FileSystemWriterAsync.finish",
        "_write_item",
        "get_write_results_queue",
    ),
    "megatron.training.initialize": ("init_persistent_async_worker",),
    "megatron.training.global_vars": ("_set_tensorboard_writer", "_set_wandb_writer"),
    "megatron.training.wandb_utils": ("on_save_checkpoint_success",),
}
"""What is replaced, by module."""

StepListener = Callable[[int, dict[str, torch.Tensor], float | None], None]
"""Called after each step with the iteration, the reduced losses and the gradient norm."""

AfterStep = Callable[[torch.nn.Module, int, Any, Any], None]
"""Called between two steps with the model chunk in evaluation mode, the iteration, and the writers of
TensorBoard and W&B (None on ranks that do not log)."""


def install_listener(listener: StepListener) -> None:
    """Tell the listener the unrounded figures of each step, which the log rounds to six digits."""
    training: Any = importlib.import_module("megatron.training.training")
    training.training_log = _listening(training.training_log, listener)


def _listening(training_log: Callable, listener: StepListener) -> Callable:
    """`training_log` that first tells the listener."""
    signature = inspect.signature(training_log)

    @functools.wraps(training_log)
    def log_and_tell(*args, **kwargs):
        values = signature.bind(*args, **kwargs).arguments
        listener(values["iteration"], values["loss_dict"], values["grad_norm"])
        return training_log(*args, **kwargs)

    return log_and_tell


def install_surviving_logs() -> None:
    """Let no failure of TensorBoard or W&B end training."""
    variables: Any = importlib.import_module("megatron.training.global_vars")
    wandb_utils: Any = importlib.import_module("megatron.training.wandb_utils")
    set_board, set_wandb = variables._set_tensorboard_writer, variables._set_wandb_writer
    note_artifact = wandb_utils.on_save_checkpoint_success

    def set_tensorboard_writer(args):
        set_board(args)
        board = variables._GLOBAL_TENSORBOARD_WRITER
        if board is not None:
            reopen = functools.partial(_open_board, type(board), args)
            variables._GLOBAL_TENSORBOARD_WRITER = SurvivingWriter("TensorBoard", board, reopen)

    def set_wandb_writer(args):
        try:
            set_wandb(args)
        except Exception as error:  # on the last rank alone, so that it has to speak for itself
            sys.stderr.write(
                f"error: W&B could not be started ({type(error).__name__}: {error}); log in with `wandb "
                "login`, write to files with WANDB_MODE=offline, or drop --wandb-project\n"
            )
            raise SystemExit(USER_ERROR_STATUS) from error
        if variables._GLOBAL_WANDB_WRITER is not None:
            variables._GLOBAL_WANDB_WRITER = SurvivingWriter("W&B", variables._GLOBAL_WANDB_WRITER)

    @functools.wraps(note_artifact)
    def on_save_checkpoint_success(*args, **kwargs):
        if variables._GLOBAL_WANDB_WRITER is not None:
            variables._GLOBAL_WANDB_WRITER.attempt(lambda: note_artifact(*args, **kwargs))

    variables._set_tensorboard_writer = set_tensorboard_writer
    variables._set_wandb_writer = set_wandb_writer
    wandb_utils.on_save_checkpoint_success = on_save_checkpoint_success


def _open_board(kind: type, args: Namespace) -> Any:
    board = kind(log_dir=args.tensorboard_dir, max_queue=args.tensorboard_queue_size)
    board.flush()
    return board


def install_before_training(action: Callable[[], None]) -> None:
    """Do something when model, optimizer and data are loaded and accepted, before the first step.

    Args:
        action: Called by every process of the job.
    """
    training: Any = importlib.import_module("megatron.training.training")
    stock = training.train

    @functools.wraps(stock)
    def train(*args, **kwargs):
        action()
        return stock(*args, **kwargs)

    training.train = train


def install_keeper(keeper: CheckpointKeeper, args: Namespace, watchdog: Watchdog) -> None:
    """Let the keeper write checkpoints and survive failing ones; none with a NaN in it is written."""
    from megatron.training import ft_integration
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_long.engine.guarded_step import all_finite, state_tensors

    training: Any = importlib.import_module("megatron.training.training")
    writers = ["megatron.core.dist_checkpointing.strategies.filesystem_async"]
    if args.async_save and args.async_strategy == "nvrx":
        writers.append("nvidia_resiliency_ext.checkpointing.async_ckpt.filesystem_async")
    _patch_writers(keeper, writers)
    _shield_helpers(writers)
    save, save_and_time = training.save_checkpoint, training.save_checkpoint_and_time
    decide, settle = training.checkpoint_and_decide_exit, _survive_late(keeper, args, watchdog)

    def save_checkpoint(iteration, model, optimizer, *rest, **options):
        watchdog.beat(LONG_PHASE)
        if keeper.job.any(not all_finite(state_tensors(model, optimizer))):
            if keeper.job.rank == 0:
                sys.stderr.write(
                    f"error: NaN or Inf in the weights or the optimizer after step {iteration}: they are not "
                    "saved, the checkpoint before is the newest\n"
                )
            raise SystemExit(FAULT_STATUS)
        whole = functools.partial(save, iteration, model, optimizer, *rest, **options)
        if not keeper.attempt(iteration, whole, (CheckpointException,)):
            ft_integration.on_checkpointing_end(is_async_finalization=False)
        watchdog.beat(LONG_PHASE)

    def save_checkpoint_and_time(iteration, *rest, **options):
        save_and_time(iteration, *rest, **options)
        if iteration >= args.train_iters:
            keeper.insist(lambda: save_and_time(iteration, *rest, **options), settle)

    def checkpoint_and_decide_exit(model, optimizer, scheduler, iteration, flops, context, data):
        leaves = decide(model, optimizer, scheduler, iteration, flops, context, data)

        def again() -> None:
            state = (iteration, model, optimizer, scheduler, flops, context)
            save_and_time(*state, train_data_iterator=data)

        if leaves:
            keeper.insist(again, settle)
        elif keeper.is_due(iteration):
            again()
        return leaves

    training.save_checkpoint = save_checkpoint
    training.save_checkpoint_and_time = save_checkpoint_and_time
    training.checkpoint_and_decide_exit = checkpoint_and_decide_exit


def _survive_late(
    keeper: CheckpointKeeper, args: Namespace, watchdog: Watchdog
) -> Callable[[], None]:
    """Survive saves that turn out to have failed in the background; give what waits for all of them."""
    from torch.distributed.checkpoint.api import CheckpointException

    training: Any = importlib.import_module("megatron.training.training")
    finalize = training.maybe_finalize_async_save

    def maybe_finalize_async_save(blocking=False, terminate=False):
        if not keeper.in_flight:
            return finalize(blocking, terminate)
        watchdog.beat(LONG_PHASE)
        whole = functools.partial(finalize, blocking, terminate)
        keeper.complete(args.curr_iteration, whole, (CheckpointException,))
        watchdog.beat()

    training.maybe_finalize_async_save = maybe_finalize_async_save
    return lambda: maybe_finalize_async_save(blocking=True)


def _shield_helpers(writers: Sequence[str]) -> None:
    """Let no signal reach the processes that the last save needs.

    They are the one that holds the writers' results, spawned at the first save, and the lasting writer of
    `--async-save`, which Megatron ends with a message.
    """
    initialize: Any = importlib.import_module("megatron.training.initialize")
    start_writer = initialize.init_persistent_async_worker

    @functools.wraps(start_writer)
    def init_persistent_async_worker(*args, **kwargs):
        with signals.withheld():
            return start_writer(*args, **kwargs)

    initialize.init_persistent_async_worker = init_persistent_async_worker
    for name in writers:
        _shield_results(importlib.import_module(name))
    atexit.register(signals.kill_helpers)


def _shield_results(files: Any) -> None:
    get = files.get_write_results_queue

    @functools.wraps(get)
    def get_write_results_queue(mp_mode: str = "spawn") -> Any:
        # Never "fork": it would keep the rank's files open, and not see its end.
        with signals.withheld():
            return get("spawn")

    files.get_write_results_queue = get_write_results_queue


def _patch_writers(keeper: CheckpointKeeper, writers: Sequence[str]) -> None:
    """Write to the keeper's folder; what fails on one process is kept, not raised there alone."""
    checkpointing: Any = importlib.import_module("megatron.training.checkpointing")
    package: Any = importlib.import_module("megatron.core.dist_checkpointing")
    serialization: Any = importlib.import_module("megatron.core.dist_checkpointing.serialization")
    save = package.save
    write_item = importlib.import_module(writers[0])._write_item  # torch's, in both

    def noting(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except OSError as error:
                return keeper.note(error)

        return call

    def save_beside(state, folder, *args, **kwargs):
        return keeper.write(Path(folder), lambda path: save(state, str(path), *args, **kwargs))

    @functools.wraps(write_item)
    def write_whole_item(transforms, stream, *args, **kwargs):
        kept = ErrorKeepingStream(stream)
        result = write_item(transforms, kept, *args, **kwargs)
        if kept.error is not None:
            keeper.note(kept.error)  # Megatron passes on no more than its class
            raise kept.error
        return result

    def ensure_directory_exists(filename, check_parent=True):
        # Megatron would make the checkpoint's own folder, empty until the save is whole.
        if check_parent:
            make_parent(filename)

    package.save = save_beside
    make_parent = noting(checkpointing.ensure_directory_exists)
    checkpointing.ensure_directory_exists = ensure_directory_exists
    serialization.save_config = noting(serialization.save_config)
    for name in writers:
        files: Any = importlib.import_module(name)
        files._write_item = write_whole_item
        files.FileSystemWriterAsync.finish = noting(files.FileSystemWriterAsync.finish)


def install_guard(
    guard: StepGuard, losses: Any, args: Namespace, watchdog: Watchdog, snapshot: Callable
) -> None:
    """Let the guard judge each step before the optimizer, and end the run when it says so.

    Args:
        losses: The `LossRecorder` that the forward step fills.
        snapshot: Told the step that ends the run; gives the folder for a checkpoint of before it, if any.
    """
    from megatron_long.engine.guarded_step import guard_optimizer

    training: Any = importlib.import_module("megatron.training.training")
    stock, signature = training.train_step, inspect.signature(training.train_step)
    guarded: list[Any] = []

    @functools.wraps(stock)
    def train_step(*positional, **named):
        values = signature.bind(*positional, **named).arguments
        optimizer = values["optimizer"]
        if not guarded:
            guard_optimizer(optimizer, guard, losses, lambda: args.curr_iteration + 1)
            guarded.append(optimizer)
        losses.clear()
        result = stock(*positional, **named)
        watchdog.end_step()
        if guard.stop_reason is None:
            return result
        folder = snapshot(args.curr_iteration + 1)
        args.save = str(folder) if folder else None
        loss_dict, _, _, _, _, *figures = result
        return (loss_dict, 1, folder is not None, True, FAULT_STATUS, *figures)

    training.train_step = train_step


def install_evaluation(is_due: Callable[[int], bool], evaluate: AfterStep) -> None:
    """Evaluate after some steps.

    Args:
        is_due: Which iterations are followed by an evaluation.
    """
    training: Any = importlib.import_module("megatron.training.training")
    training.post_training_step_callbacks = _evaluating(
        training.post_training_step_callbacks, is_due, evaluate
    )


def _evaluating(
    callbacks: Callable, is_due: Callable[[int], bool], evaluate: AfterStep
) -> Callable:
    """`post_training_step_callbacks` that evaluates first, as Megatron's loop brackets its own evaluation."""
    signature = inspect.signature(callbacks)

    @functools.wraps(callbacks)
    def evaluate_and_call(*args, **kwargs):
        values = signature.bind(*args, **kwargs).arguments
        if is_due(values["iteration"]):
            _evaluate_between_steps(
                values["model"], values["optimizer"], values["iteration"], evaluate
            )
        return callbacks(*args, **kwargs)

    return evaluate_and_call


def _evaluate_between_steps(
    chunks: list[torch.nn.Module], optimizer: Any, iteration: int, evaluate: AfterStep
) -> None:
    from megatron.core.utils import get_model_config
    from megatron.training import global_vars, training

    timers, config = global_vars.get_timers(), get_model_config(chunks[0])
    has_hook = training.should_disable_forward_pre_hook(global_vars.get_args())
    timers("interval-time").stop()
    if has_hook:  # gathers the parameters that the next forward pass would gather
        training.disable_forward_pre_hook(chunks, optimizer=optimizer)
    config_timers, config.timers = config.timers, None
    chunks[0].eval()
    try:
        writers = global_vars.get_tensorboard_writer(), global_vars.get_wandb_writer()
        evaluate(chunks[0], iteration, *writers)
    finally:
        chunks[0].train()
        config.timers = config_timers
    if has_hook:
        training.enable_forward_pre_hook(chunks)
    timers("interval-time", log_level=0).start(barrier=True)
