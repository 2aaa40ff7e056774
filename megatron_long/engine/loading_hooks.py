"""Changes to Megatron's loading: which checkpoint, and which of its weights.

A contract for each symbol is in `tests/engine/test_megatron_adapter.py`.
"""

import functools
import importlib
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_long.checkpoint.choosing import Choice

CHANGED_SYMBOLS = {
    "megatron.training.training": ("load_checkpoint",),
    "megatron.training.checkpointing": (
        *("read_metadata", "checkpoint_exists"),
        "_maybe_setup_gpt_to_hybrid_load",
    ),
    "megatron.core.dist_checkpointing": ("load",),
}
"""Symbols replaced, by module."""


def load_from(choice: Choice, args: Namespace) -> None:
    """Make Megatron load this checkpoint, regardless of the tracker file."""
    checkpointing: Any = importlib.import_module("megatron.training.checkpointing")
    folder = choice.folder.parent
    read, exists = checkpointing.read_metadata, checkpointing.checkpoint_exists
    pinned = (choice.iteration or 0, choice.iteration is None)

    def read_metadata(tracker):
        return pinned if Path(tracker).parent == folder else read(tracker)

    def checkpoint_exists(path):
        return (path is not None and Path(path) == folder) or exists(path)

    checkpointing.read_metadata = read_metadata
    checkpointing.checkpoint_exists = checkpoint_exists
    args.ckpt_step = choice.iteration


def keep_optimizer() -> None:
    """Make Megatron load the optimizer with weights that start another run, and set the rates of this run.

    Megatron-Core 0.19.2 does so for a model of another kind; the parameter groups then still have the
    learning rate and weight decay of the checkpoint's last step.
    """
    training: Any = importlib.import_module("megatron.training.training")
    checkpointing: Any = importlib.import_module("megatron.training.checkpointing")
    set_up, stock = checkpointing._maybe_setup_gpt_to_hybrid_load, training.load_checkpoint

    @functools.wraps(stock)
    def load_checkpoint(model, optimizer, scheduler, *args, **kwargs):
        found = stock(model, optimizer, scheduler, *args, **kwargs)
        scheduler.step(0)
        return found

    checkpointing._maybe_setup_gpt_to_hybrid_load = lambda *given: (set_up(*given)[0], True)
    training.load_checkpoint = load_checkpoint


def load_main_copy(iteration: Path, prefix: str) -> None:
    """Make Megatron fill the model with the optimizer's main copy when it loads this checkpoint.

    Args:
        iteration: Folder of the checkpoint.
        prefix: Prefix of the main copy's names.
    """
    from megatron_long.engine.main_weights import rename_on_load

    checkpointing: Any = importlib.import_module("megatron.core.dist_checkpointing")
    checkpointing.load = rename_on_load(checkpointing.load, iteration, prefix)


def install_exact_start(iteration: Path, prefix: str) -> None:
    """Fill the optimizer's main copy with the checkpoint's weights after Megatron has loaded only the model.

    Args:
        iteration: Folder of the checkpoint.
        prefix: See `main_weights.take_main_weights`.
    """
    from megatron.core.utils import unwrap_model

    from megatron_long.engine.main_weights import take_main_weights

    training: Any = importlib.import_module("megatron.training.training")
    stock = training.load_checkpoint

    @functools.wraps(stock)
    def load_checkpoint(model, optimizer, *args, **kwargs):
        found = stock(model, optimizer, *args, **kwargs)
        take_main_weights(optimizer, unwrap_model(model), iteration, prefix)
        return found

    training.load_checkpoint = load_checkpoint


def take_weights(iteration: Path, prefix: str, args: Namespace) -> None:
    """Return a start without optimizer state the weights from before FP8 rounding.

    Args:
        iteration: Folder of the checkpoint.
        prefix: See `load_main_copy`; "" if the model's own weights are not rounded.
        args: Flags after Megatron's validation.
    """
    if prefix:
        load_main_copy(iteration, prefix)
    if prefix or args.fp8_param_gather:
        install_exact_start(iteration, prefix)
