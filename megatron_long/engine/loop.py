"""Megatron's training loop, changed in one place: it fires the events of `engine.callback`.

The loop looks up its functions by name in its module. `Loop.install` replaces those of
`CHANGED_SYMBOLS` with methods of the same names, which call Megatron's and fire events around it.
"""

import functools
import importlib
import inspect
from argparse import Namespace
from collections.abc import Callable
from typing import Any, Protocol

import torch

from megatron_long.engine.callback import Callback, Gradients, Log, Step

LOOP = "megatron.training.training"
CHANGED_SYMBOLS = {
    LOOP: (
        "train",
        "train_step",
        "training_log",
        "post_training_step_callbacks",
        "checkpoint_and_decide_exit",
        "save_checkpoint_and_time",
        "save_checkpoint",
    )
}
"""Symbols replaced, by module; and `prepare_grads` of the optimizer."""


class Saving(Protocol):
    """How checkpoints are saved."""

    def save(self, step: Step, write: Callable[[], None]) -> bool:
        """Let Megatron write one; return whether it is written, or being written."""

    def is_due(self, iteration: int) -> bool:
        """Whether a failed save is to be retried."""

    def insist(self, save: Callable[[], None]) -> None:
        """The process ends after this save, which has been tried once, or without one."""


class Loop:
    """Megatron's functions with events around them.

    Args:
        events: Receives the events; see `Callbacks` for several.
        saving: Performs each save.
        args: Flags, which contain Megatron's counters.
    """

    def __init__(self, events: Callback, saving: Saving, args: Namespace) -> None:
        self.events, self.saving, self.args = events, saving, args
        self._training: Any = importlib.import_module(LOOP)
        self._stock = {name: getattr(self._training, name) for name in CHANGED_SYMBOLS[LOOP]}
        self._signatures = {name: inspect.signature(call) for name, call in self._stock.items()}
        self._step: Step | None = None

    def install(self) -> None:
        """Replace Megatron's functions."""
        for name in self._stock:
            setattr(self._training, name, getattr(self, name))

    def train(self, *positional: Any, **named: Any) -> Any:
        """Megatron's loop."""
        given = self._given("train", positional, named)
        self.events.before_training(Step(self.args.iteration, given["model"], given["optimizer"]))
        return self._stock["train"](*positional, **named)

    def train_step(self, *positional: Any, **named: Any) -> tuple:
        """A step, whose `should_exit` makes the loop exit with the exit status next to it."""
        given = self._given("train_step", positional, named)
        if self._step is None:
            self._watch_gradients(given["optimizer"])
        step = Step(self.args.curr_iteration + 1, given["model"], given["optimizer"])
        self._step = step
        self.events.before_step(step)
        result = self._stock["train_step"](*positional, **named)
        end = self.events.after_step(step)
        if end is None:
            return result
        if end.snapshot is not None:
            self.args.save = str(end.snapshot)
        losses, _, _, _, _, *figures = result
        return (losses, 1, end.snapshot is not None, True, end.status, *figures)

    def training_log(self, *positional: Any, **named: Any) -> Any:
        """The log line of a step, printed or not."""
        given = self._given("training_log", positional, named)
        self.events.on_log(Log(given["iteration"], given["loss_dict"], given["grad_norm"]))
        return self._stock["training_log"](*positional, **named)

    def post_training_step_callbacks(self, *positional: Any, **named: Any) -> Any:
        """Megatron's work after its validation."""
        given = self._given("post_training_step_callbacks", positional, named)
        self.events.between_steps(Step(given["iteration"], given["model"], given["optimizer"]))
        return self._stock["post_training_step_callbacks"](*positional, **named)

    def checkpoint_and_decide_exit(
        self,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        iteration: int,
        flops: Any,
        context: Any,
        data: Any,
    ) -> bool:
        """Megatron's saves and decision, retries of a failed save, and saves requested by callbacks."""
        leaves: bool = self._stock["checkpoint_and_decide_exit"](
            model, optimizer, scheduler, iteration, flops, context, data
        )
        save = functools.partial(
            self._stock["save_checkpoint_and_time"],
            *(iteration, model, optimizer, scheduler, flops, context),
            train_data_iterator=data,
        )
        if leaves:
            self.saving.insist(save)
        elif self.saving.is_due(iteration):
            save()
        if self.events.wants_save(Step(iteration, model, optimizer), leaves) and self.args.save:
            save()
        return leaves

    def save_checkpoint_and_time(self, iteration: int, *rest: Any, **options: Any) -> None:
        """A save with its timers; the one after the last step is the last of the run."""
        save = functools.partial(
            self._stock["save_checkpoint_and_time"], iteration, *rest, **options
        )
        save()
        if iteration >= self.args.train_iters:
            self.saving.insist(save)

    def save_checkpoint(
        self, iteration: int, model: Any, optimizer: Any, *rest: Any, **options: Any
    ) -> None:
        """A save."""
        step, stock = Step(iteration, model, optimizer), self._stock["save_checkpoint"]
        write = functools.partial(stock, iteration, model, optimizer, *rest, **options)
        self.events.before_save(step)
        is_saved = self.saving.save(step, write)
        self.events.after_save(step, is_saved)

    def _given(self, name: str, positional: tuple, named: dict[str, Any]) -> dict[str, Any]:
        return self._signatures[name].bind(*positional, **named).arguments

    def _watch_gradients(self, optimizer: Any) -> None:
        """Make `prepare_grads`, which skips overflows in FP16 training, also call the callbacks."""
        stock = optimizer.prepare_grads

        @torch.no_grad()
        def prepare_grads() -> bool:
            assert self._step is not None
            overflow: bool = stock()
            gradients = Gradients(
                overflow,
                overflow and _lowers_loss_scale(optimizer),
                lambda: float(optimizer.get_grad_norm() or 0.0),
            )
            return self.events.after_backward(self._step, gradients) or overflow

        optimizer.prepare_grads = prepare_grads


def _lowers_loss_scale(optimizer: Any) -> bool:
    """Whether the loss scale of FP16 can go down after an overflow."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        scaler: Any = getattr(part, "grad_scaler", None)
        lowest = getattr(scaler, "min_scale", None)  # a constant scaler has none
        if lowest is not None and bool(scaler.scale > lowest):
            return True
    return False
