"""The events of training, and the base class of callbacks.

Every event fires on every rank of the job, in the order of the list of callbacks, so a callback may
communicate with the other ranks. A callback that raises ends its process, as any error in the loop does.

    before_training                 once, everything loaded and accepted
      before_step                   each step
        after_backward              gradients are reduced, the optimizer has not run
      after_step                    the optimizer has run, or has skipped the step
      on_log                        then Megatron prints its line and validates
      between_steps                 then Megatron saves and decides whether to exit
      wants_save
    before_save, after_save         around each save, for any reason
    before_settle, after_settle     around waiting for saves in the background
    on_end                          once, when the run ends for any reason
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Step:
    """The state of training."""

    iteration: int
    """From 1: the current step or, between steps and at saves, the last completed one; 0 before the first."""
    model: Sequence[Any]
    """This rank's chunks, wrapped by Megatron."""
    optimizer: Any
    """Megatron's."""


@dataclass(frozen=True)
class Gradients:
    """The gradients of a step, before the optimizer uses them."""

    overflow: bool
    """Whether Megatron has found NaN or Inf in them, and skips the step itself (FP16)."""
    lowers_loss_scale: bool
    """Whether an overflow lowers FP16's loss scale, which is normal loss scaling and not a fault."""
    norm: Callable[[], float]
    """Returns the norm over all ranks, before clipping; a collective."""


@dataclass(frozen=True)
class Log:
    """The figures of a step, unrounded."""

    iteration: int
    """From 1."""
    losses: Mapping[str, Any]
    """Means over the step's tokens, nats, by name; empty but on the last pipeline stage."""
    grad_norm: float | None
    """Before clipping."""


@dataclass(frozen=True)
class End:
    """How a callback ends the run; all ranks return the same."""

    status: int
    """Exit status."""
    snapshot: Path | None = None
    """Folder for a checkpoint from before the step, which the optimizer skipped; None saves nothing."""


class Callback:
    """Does nothing at any event."""

    def before_training(self, step: Step) -> None:
        """Model, optimizer and data are loaded and accepted; the step is the last completed one."""

    def before_step(self, step: Step) -> None:
        """No data of the step have been read yet."""

    def after_backward(self, step: Step, gradients: Gradients) -> bool:
        """Whether the optimizer is to skip this step; all ranks return the same.

        Weights, optimizer and schedule then stay unchanged, and the data advance.
        """
        return False

    def after_step(self, step: Step) -> End | None:
        """The optimizer has run; the step is neither counted nor logged yet; an `End` ends the run."""
        return None

    def on_log(self, log: Log) -> None:
        """Each step, also those that Megatron does not log."""

    def between_steps(self, step: Step) -> None:
        """After the step's log; see `engine.pausing` for evaluations here."""

    def wants_save(self, step: Step, leaves: bool) -> bool:
        """Whether to save now, after Megatron's own saves; all ranks return the same.

        Without `--save` nothing is saved.

        Args:
            leaves: Whether the run ends with this step.
        """
        return False

    def before_save(self, step: Step) -> None:
        """A checkpoint of this step is about to be written."""

    def after_save(self, step: Step, is_saved: bool) -> None:
        """Not called if an error ends the run.

        Args:
            is_saved: Whether it is written, or being written with `--async-save`.
        """

    def before_settle(self) -> None:
        """Checkpoints are being written in the background, and are finalized or waited for."""

    def after_settle(self) -> None:
        """Not called if an error ends the run."""

    def on_end(self) -> None:
        """The run has ended, by its last step or by an error, possibly before its first step."""


class Callbacks(Callback):
    """Several callbacks as one: each event goes to all of them, in order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = tuple(callbacks)

    def before_training(self, step: Step) -> None:
        """Call all."""
        for callback in self.callbacks:
            callback.before_training(step)

    def before_step(self, step: Step) -> None:
        """Call all."""
        for callback in self.callbacks:
            callback.before_step(step)

    def after_backward(self, step: Step, gradients: Gradients) -> bool:
        """Call all; the step is skipped if any returns True."""
        answers = [callback.after_backward(step, gradients) for callback in self.callbacks]
        return any(answers)

    def after_step(self, step: Step) -> End | None:
        """Call all; return the first `End`."""
        ends = [callback.after_step(step) for callback in self.callbacks]
        return next((end for end in ends if end is not None), None)

    def on_log(self, log: Log) -> None:
        """Call all."""
        for callback in self.callbacks:
            callback.on_log(log)

    def between_steps(self, step: Step) -> None:
        """Call all."""
        for callback in self.callbacks:
            callback.between_steps(step)

    def wants_save(self, step: Step, leaves: bool) -> bool:
        """Call all; True if any returns True."""
        answers = [callback.wants_save(step, leaves) for callback in self.callbacks]
        return any(answers)

    def before_save(self, step: Step) -> None:
        """Call all."""
        for callback in self.callbacks:
            callback.before_save(step)

    def after_save(self, step: Step, is_saved: bool) -> None:
        """Call all."""
        for callback in self.callbacks:
            callback.after_save(step, is_saved)

    def before_settle(self) -> None:
        """Call all."""
        for callback in self.callbacks:
            callback.before_settle()

    def after_settle(self) -> None:
        """Call all."""
        for callback in self.callbacks:
            callback.after_settle()

    def on_end(self) -> None:
        """Call all, even if one of them raises."""
        with contextlib.ExitStack() as stack:
            for callback in reversed(self.callbacks):
                stack.callback(callback.on_end)
