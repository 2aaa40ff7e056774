"""What follows each step in Megatron's loop: its line in the log, and a save when the time has come.

Called by the entry after `megatron_hooks`, whose `CHANGED_SYMBOLS` lists what is replaced here too.
"""

import functools
import importlib
import inspect
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_long.checkpoint.saving import CheckpointKeeper
from megatron_long.engine.save_clock import SaveClock


def install_first_log(action: Callable[[], None]) -> None:
    """Let each line of the log hold the steps since the line before.

    Megatron logs the first step of a start and keeps it in the mean that it logs next: with --log-interval 1
    the second loss would be that of two steps.

    Args:
        action: Called before the first line.
    """
    from megatron.training.global_vars import get_args

    training: Any = importlib.import_module("megatron.training.training")
    stock, signature = training.training_log, inspect.signature(training.training_log)

    @functools.wraps(stock)
    def training_log(*positional, **named):
        action()
        values = signature.bind(*positional, **named)
        if values.arguments["iteration"] % get_args().log_interval == 0:
            values.arguments["is_first_iteration"] = False
        return stock(*values.args, **values.kwargs)

    training.training_log = training_log


def install_save_clock(clock: SaveClock, keeper: CheckpointKeeper, args: Namespace) -> None:
    """Save by time too, in the step after which the time is over on any rank; after `install_keeper`."""
    training: Any = importlib.import_module("megatron.training.training")
    save, decide = training.save_checkpoint, training.checkpoint_and_decide_exit

    @functools.wraps(save)
    def save_checkpoint(*positional, **named):
        save(*positional, **named)
        clock.restart()

    @functools.wraps(decide)
    def checkpoint_and_decide_exit(model, optimizer, scheduler, iteration, flops, context, data):
        leaves = decide(model, optimizer, scheduler, iteration, flops, context, data)
        due = clock.is_due() and not keeper.in_flight
        if not leaves and iteration < args.train_iters and args.save and keeper.job.any(due):
            state = (iteration, model, optimizer, scheduler, flops, context)
            training.save_checkpoint_and_time(*state, train_data_iterator=data)
        return leaves

    training.save_checkpoint = save_checkpoint
    training.checkpoint_and_decide_exit = checkpoint_and_decide_exit
