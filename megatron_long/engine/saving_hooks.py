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

from megatron_long.checkpoint.saving import FAULT_STATUS, CheckpointKeeper, ErrorKeepingStream
from megatron_long.engine.callback import Callback, Step
from megatron_long.job import signals

CHANGED_SYMBOLS = {
    "megatron.training.training": ("maybe_finalize_async_save",),
    "megatron.training.checkpointing": ("ensure_directory_exists",),
    "megatron.core.dist_checkpointing": ("save",),
    "megatron.core.dist_checkpointing.serialization": ("save_config",),
    "megatron.core.dist_checkpointing.strategies.filesystem_async": (
        "FileSystemWriterAsync.finish",
        "_write_item",
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
        writers = ["megatron.core.dist_checkpointing.strategies.filesystem_async"]
        if self.args.async_save and self.args.async_strategy == "nvrx":
            writers.append("nvidia_resiliency_ext.checkpointing.async_ckpt.filesystem_async")
        _patch_writers(self.keeper, writers)
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


def _patch_writers(keeper: CheckpointKeeper, writers: Sequence[str]) -> None:
    """Write to the keeper's folder; an error on one process is kept, not raised only there."""
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
            keeper.note(kept.error)  # Megatron passes on only its class
            raise kept.error
        return result

    def ensure_directory_exists(filename, check_parent=True):
        # Megatron would create the checkpoint's own folder, empty until the save is complete.
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
