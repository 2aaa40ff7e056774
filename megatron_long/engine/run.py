"""A training run on Megatron's loop, from its first line to the end of the process group."""

from argparse import Namespace
from collections.abc import Callable, Sequence

from megatron_long.checkpoint.saving import CheckpointKeeper
from megatron_long.engine import megatron_adapter
from megatron_long.engine.callback import Callback, Callbacks
from megatron_long.engine.fixes.first_log import log_each_step_once
from megatron_long.engine.loop import Loop
from megatron_long.engine.saving_hooks import KeptSaves


def run_training(
    args: Namespace,
    dataset_provider: Callable,
    forward_step: Callable,
    *,
    callbacks: Sequence[Callback],
    keeper: CheckpointKeeper,
    program_start: float,
    fill_model: Callable[[list], None] | None = None,
    lengths_vary: bool = False,
) -> None:
    """Train.

    Args:
        args: Flags after `megatron_adapter.validate_flags`.
        callbacks: Receive each event, in this order.
        keeper: Writes the checkpoints.
        program_start: Time in seconds, for Megatron's startup figures.
        fill_model: Called with the model chunks of this rank when they are built and before anything else,
            including the optimizer, is created from them.
        lengths_vary: Whether micro-batches may differ in length.
    Raises: ConfigError: see `megatron_adapter.run_pretrain`.
    """
    events = Callbacks(callbacks)
    try:
        log_each_step_once()
        saves = KeptSaves(keeper, events, args)
        saves.install()
        Loop(events, saves, args).install()
        megatron_adapter.run_pretrain(
            args,
            dataset_provider,
            forward_step,
            program_start,
            fill_model,
            lengths_vary=lengths_vary,
        )
    finally:
        events.on_end()
