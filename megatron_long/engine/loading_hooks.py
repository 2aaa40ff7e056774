"""What is changed where Megatron loads: which checkpoint, and which of its weights.

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
    "megatron.training.checkpointing": ("read_metadata", "checkpoint_exists"),
    "megatron.core.dist_checkpointing": ("load",),
}
"""What is replaced, by module."""


def load_from(choice: Choice, args: Namespace) -> None:
    """Let Megatron load this checkpoint, whatever the tracker file says."""
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


def load_main_copy(iteration: Path, prefix: str) -> None:
    """Let Megatron fill the model with the optimizer's main copy where it loads this checkpoint.

    Args:
        iteration: Folder of the checkpoint.
        prefix: What the main copy's names have before the model's.
    """
    from megatron_long.engine.main_weights import rename_on_load

    checkpointing: Any = importlib.import_module("megatron.core.dist_checkpointing")
    checkpointing.load = rename_on_load(checkpointing.load, iteration, prefix)


def install_exact_start(iteration: Path, prefix: str) -> None:
    """Let the optimizer's main copy be the checkpoint's weights, once Megatron has loaded the model alone.

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
    """Let a start that loads no optimizer state have the weights as they were before FP8 rounded them.

    Args:
        iteration: Folder of the checkpoint.
        prefix: See `load_main_copy`; "" where the model's own weights are not rounded.
        args: Flags after Megatron's validation.
    """
    if prefix:
        load_main_copy(iteration, prefix)
    if prefix or args.fp8_param_gather:
        install_exact_start(iteration, prefix)
