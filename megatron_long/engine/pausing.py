"""Evaluation between two steps: the model in evaluation mode, with Megatron's timers stopped."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_long.engine.callback import Step


@dataclass(frozen=True)
class Writers:
    """Where the run logs to; None on ranks that do not log."""

    tensorboard: Any
    wandb: Any


@contextlib.contextmanager
def training_paused(step: Step) -> Iterator[Writers]:
    """Wrap an evaluation as Megatron's loop wraps its own; called on every rank.

    Inside, `step.model[0]`, the only chunk, is in evaluation mode and its parameters are gathered.
    """
    from megatron.core.utils import get_model_config
    from megatron.training import global_vars, training

    chunks, optimizer = step.model, step.optimizer
    timers, config = global_vars.get_timers(), get_model_config(chunks[0])
    has_hook = training.should_disable_forward_pre_hook(global_vars.get_args())
    timers("interval-time").stop()
    if has_hook:  # gathers the parameters that the next forward pass would gather
        training.disable_forward_pre_hook(chunks, optimizer=optimizer)
    config_timers, config.timers = config.timers, None
    chunks[0].eval()
    try:
        yield Writers(global_vars.get_tensorboard_writer(), global_vars.get_wandb_writer())
    finally:
        chunks[0].train()
        config.timers = config_timers
    if has_hook:
        training.enable_forward_pre_hook(chunks)
    timers("interval-time", log_level=0).start(barrier=True)
