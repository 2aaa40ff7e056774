"""Changes to Megatron's saving: the keeper names folders, survives failed saves and retries the last.

`engine.loop` passes each save to `KeptSaves`. The other changes are where the files are written.
"""

import atexit
import functools
import importlib
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_long.checkpoint import shard_writer
from megatron_long.checkpoint.saving import FAULT_STATUS, CheckpointKeeper, ErrorKeepingStream
from megatron_long.engine.callback import Callback, Step
from megatron_long.job import signals

MEGATRON_WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"
NVRX_WRITER = "nvidia_resiliency_ext.checkpointing.async_ckpt.filesystem_async"
"""Modules whose `FileSystemWriterAsync` writes the shards; with --async-save Megatron can use the second."""

CHANGED_SYMBOLS = {
    "megatron.training.training": ("maybe_finalize_async_save",),
    "megatron.training.checkpointing": ("ensure_directory_exists",),
    "megatron.core.dist_checkpointing": ("save",),
    "megatron.core.dist_checkpointing.serialization": ("save_config",),
    MEGATRON_WRITER: (
        "FileSystemWriterAsync.finish",
        "FileSystemWriterAsync.get_save_function_and_args",
        "get_write_results_queue",
    ),
    "megatron.training.initialize": ("init_persistent_async_worker",),
}
"""Symbols replaced, by module."""


class KeptSaves:
    """Saves through the keeper; state containing NaN is not saved.

    Args:
        events: Notified when saves in the background are waited for.
        args: Flags, which contain Megatron's counters.
    """

    def __init__(self, keeper: CheckpointKeeper, events: Callback, args: Namespace) -> None:
        self.keeper, self.events, self.args = keeper, events, args
        self._finalize: Callable[[bool, bool], None] | None = None

    def install(self) -> None:
        """Replace functions called by `save_checkpoint`."""
        writers = [MEGATRON_WRITER]
        if self.args.async_save and self.args.async_strategy == "nvrx":
            writers.append(NVRX_WRITER)
        _patch_saving(self.keeper, writers)
        _write_own_shards(self.keeper, in_background=self.args.async_save)
        if NVRX_WRITER in writers:
            _keep_errors(self.keeper, NVRX_WRITER)
        _shield_helpers(writers)
        training: Any = importlib.import_module("megatron.training.training")
        self._finalize = training.maybe_finalize_async_save
        training.maybe_finalize_async_save = self.finalize

    def save(self, step: Step, write: Callable[[], None]) -> bool:
        """Let Megatron write a checkpoint, and continue if that fails.

        Raises: SystemExit: NaN or Inf in the weights or the optimizer of any rank.
        """
        from megatron.training import ft_integration
        from torch.distributed.checkpoint.api import CheckpointException

        from megatron_long.engine.state_tensors import all_finite, state_tensors

        if self.keeper.job.any(not all_finite(state_tensors(step.model, step.optimizer))):
            if self.keeper.job.rank == 0:
                sys.stderr.write(
                    f"error: NaN or Inf in the weights or the optimizer after step {step.iteration}: they "
                    "are not saved, the previous checkpoint remains the newest\n"
                )
            raise SystemExit(FAULT_STATUS)
        is_saved = self.keeper.attempt(step.iteration, write, (CheckpointException,))
        if not is_saved:
            ft_integration.on_checkpointing_end(is_async_finalization=False)
        return is_saved

    def is_due(self, iteration: int) -> bool:
        """Whether a failed save is to be retried."""
        return self.keeper.is_due(iteration)

    def insist(self, save: Callable[[], None]) -> None:
        """Keep the process alive until its last checkpoint is complete, see `CheckpointKeeper.insist`."""
        self.keeper.insist(save, lambda: self.finalize(blocking=True))

    def finalize(self, blocking: bool = False, terminate: bool = False) -> None:
        """`maybe_finalize_async_save`, which continues after failed saves in the background."""
        from torch.distributed.checkpoint.api import CheckpointException

        assert self._finalize is not None
        if not self.keeper.in_flight:
            return self._finalize(blocking, terminate)
        self.events.before_settle()
        whole = functools.partial(self._finalize, blocking, terminate)
        self.keeper.complete(self.args.curr_iteration, whole, (CheckpointException,))
        self.events.after_settle()
        return None


def _shield_helpers(writers: Sequence[str]) -> None:
    """Keep signals from reaching the processes that the last save needs.

    These are the one that holds the writers' results, spawned at the first save, and the persistent writer of
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


def _noting(keeper: CheckpointKeeper, function: Callable) -> Callable:
    """Keep an error of this process, to be exchanged with the others."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except OSError as error:
            return keeper.note(error)

    return call


def _patch_saving(keeper: CheckpointKeeper, writers: Sequence[str]) -> None:
    """Write to the keeper's folder; an error on one process is kept, not raised only there."""
    checkpointing: Any = importlib.import_module("megatron.training.checkpointing")
    package: Any = importlib.import_module("megatron.core.dist_checkpointing")
    serialization: Any = importlib.import_module("megatron.core.dist_checkpointing.serialization")
    save = package.save

    def save_beside(state, folder, *args, **kwargs):
        return keeper.write(Path(folder), lambda path: save(state, str(path), *args, **kwargs))

    def ensure_directory_exists(filename, check_parent=True):
        # Megatron would create the checkpoint's own folder, empty until the save is complete.
        if check_parent:
            make_parent(filename)

    package.save = save_beside
    make_parent = _noting(keeper, checkpointing.ensure_directory_exists)
    checkpointing.ensure_directory_exists = ensure_directory_exists
    serialization.save_config = _noting(keeper, serialization.save_config)
    for name in writers:
        writer: Any = importlib.import_module(name).FileSystemWriterAsync
        writer.finish = _noting(keeper, writer.finish)


def _write_own_shards(keeper: CheckpointKeeper, *, in_background: bool) -> None:
    """Stage and write with `checkpoint.shard_writer` what Megatron's writer plans."""
    writer_class: Any = importlib.import_module(MEGATRON_WRITER).FileSystemWriterAsync
    stock = writer_class.get_save_function_and_args

    def write_noting(*args: Any) -> None:
        error = shard_writer.write_shards(*args)
        if error is not None:
            keeper.note(error)  # torch passes on only its message

    @functools.wraps(stock)
    def get_save_function_and_args(writer: Any) -> tuple:
        if not writer.write_buckets or writer.use_msc:  # an object store has no files to write to
            return stock(writer)
        # In the background they run in another process, which finds them by name.
        write = shard_writer.write_shards if in_background else write_noting
        prepare = shard_writer.stage if in_background else shard_writer.leave
        return (
            functools.partial(write, getattr(writer, "transforms", None)),
            functools.partial(prepare, writer.write_buckets),
            [keeper.job.rank, writer.write_buckets, writer.results_queue],
        )

    writer_class.get_save_function_and_args = get_save_function_and_args


def _keep_errors(keeper: CheckpointKeeper, name: str) -> None:
    """Let another writer's disk errors end neither Python nor only this process."""
    files: Any = importlib.import_module(name)
    write_item = files._write_item

    @functools.wraps(write_item)
    def write_whole_item(transforms, stream, *args, **kwargs):
        kept = ErrorKeepingStream(stream)
        result = write_item(transforms, kept, *args, **kwargs)
        if kept.error is not None:
            keeper.note(kept.error)  # Megatron passes on only its class
            raise kept.error
        return result

    files._write_item = write_whole_item
