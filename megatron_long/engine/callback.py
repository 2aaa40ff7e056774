"""The events of training, and the base class of those who listen to them.

Every event fires on every rank of the job, in the order of the list of callbacks, so that a callback may
speak with the other ranks. One that raises ends its process, as any error in the loop does.

    before_training                 once, everything loaded and accepted
      before_step                   each step
        after_backward              gradients are reduced, the optimizer has not run
      after_step                    the optimizer has run, or has left the step out
      on_log                        then Megatron prints its line and validates
      between_steps                 then Megatron saves and decides whether to leave
      wants_save
    before_save, after_save         around each save, whoever asked for it
    before_settle, after_settle     around waiting for saves in the background
    on_end                          once, however the run ends
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Step:
    """Where training stands."""

    iteration: int
    """From 1: the step in work or, between steps and at saves, the last one done; 0 before the first."""
    model: Sequence[Any]
    """This rank's chunks, as Megatron has wrapped them."""
    optimizer: Any
    """Megatron's."""


@dataclass(frozen=True)
class Gradients:
    """What is known of a step's gradients before the optimizer takes them."""

    overflow: bool
    """Whether Megatron has found NaN or Inf in them, and leaves the step out by itself (FP16)."""
    lowers_loss_scale: bool
    """Whether there is an overflow that lowers the loss scale of FP16, which is found so: it is no fault."""
    norm: Callable[[], float]
    """Gives the norm over all ranks, before clipping; a collective."""


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
    """How a callback ends the run; all ranks give the same."""

    status: int
    """Exit status."""
    snapshot: Path | None = None
    """Folder for a checkpoint of before the step, which the optimizer has left out; None saves nothing."""


class Callback:
    """Does nothing at any event."""

    def before_training(self, step: Step) -> None:
        """Model, optimizer and data are loaded and accepted; the step is the last one done."""

    def before_step(self, step: Step) -> None:
        """No data of the step is read yet."""

    def after_backward(self, step: Step, gradients: Gradients) -> bool:
        """Whether the optimizer is to leave this step out; all ranks answer alike.

        Weights, optimizer and schedule then stay as they were, and the data go on.
        """
        return False

    def after_step(self, step: Step) -> End | None:
        """The optimizer has run, the step is neither counted nor logged yet; an `End` ends the run."""
        return None

    def on_log(self, log: Log) -> None:
        """Each step, also one of which Megatron prints no line."""

    def between_steps(self, step: Step) -> None:
        """After the step's log; see `engine.pausing` for what measures the model here."""

    def wants_save(self, step: Step, leaves: bool) -> bool:
        """Whether to save now, besides Megatron's own saves, which are done; all ranks answer alike.

        Without `--save` nothing is.

        Args:
            leaves: Whether the run ends with this step.
        """
        return False

    def before_save(self, step: Step) -> None:
        """A checkpoint of this step is about to be written."""

    def after_save(self, step: Step, is_saved: bool) -> None:
        """Not called where an error ends the run.

        Args:
            is_saved: Whether it is written, or on its way with `--async-save`.
        """

    def before_settle(self) -> None:
        """Checkpoints are being written in the background, and are looked after or waited for."""

    def after_settle(self) -> None:
        """Not called where an error ends the run."""

    def on_end(self) -> None:
        """The run is over, by its last step or by an error, maybe before its first step."""


class Callbacks(Callback):
    """Several callbacks as one: each event goes to all of them, in order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = tuple(callbacks)

    def before_training(self, step: Step) -> None:
        """To all."""
        for callback in self.callbacks:
            callback.before_training(step)

    def before_step(self, step: Step) -> None:
        """To all."""
        for callback in self.callbacks:
            callback.before_step(step)

    def after_backward(self, step: Step, gradients: Gradients) -> bool:
        """Ask all; one that wants the step left out is enough."""
        answers = [callback.after_backward(step, gradients) for callback in self.callbacks]
        return any(answers)

    def after_step(self, step: Step) -> End | None:
        """Ask all; the first one that ends the run says how."""
        ends = [callback.after_step(step) for callback in self.callbacks]
        return next((end for end in ends if end is not None), None)

    def on_log(self, log: Log) -> None:
        """To all."""
        for callback in self.callbacks:
            callback.on_log(log)

    def between_steps(self, step: Step) -> None:
        """To all."""
        for callback in self.callbacks:
            callback.between_steps(step)

    def wants_save(self, step: Step, leaves: bool) -> bool:
        """Ask all; one is enough."""
        answers = [callback.wants_save(step, leaves) for callback in self.callbacks]
        return any(answers)

    def before_save(self, step: Step) -> None:
        """To all."""
        for callback in self.callbacks:
            callback.before_save(step)

    def after_save(self, step: Step, is_saved: bool) -> None:
        """To all."""
        for callback in self.callbacks:
            callback.after_save(step, is_saved)

    def before_settle(self) -> None:
        """To all."""
        for callback in self.callbacks:
            callback.before_settle()

    def after_settle(self) -> None:
        """To all."""
        for callback in self.callbacks:
            callback.after_settle()

    def on_end(self) -> None:
        """To all, also where one of them raises."""
        with contextlib.ExitStack() as stack:
            for callback in reversed(self.callbacks):
                stack.callback(callback.on_end)
