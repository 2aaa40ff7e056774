"""Saves by time: `--save-minutes`."""

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

from megatron_long.checkpoint.saving import CheckpointKeeper
from megatron_long.engine.callback import Callback, Step


@dataclass
class SaveClock:
    """Counts from the end of the last save, or from the first step of this start.

    >>> times = iter([100.0, 159.0, 160.0, 170.0, 171.0])
    >>> clock = SaveClock(60.0, now=lambda: next(times))
    >>> clock.is_due(), clock.is_due(), clock.is_due()
    (False, False, True)
    >>> clock.restart()
    >>> clock.is_due()
    False
    """

    seconds: float
    now: Callable[[], float] = time.monotonic
    _since: float | None = None

    def is_due(self) -> bool:
        """Whether the interval has passed on this process; called after each step."""
        if self._since is None:
            self.restart()
            return False
        return self.now() - self._since >= self.seconds

    def restart(self) -> None:
        """Restart the count: a save was written, or has failed and is retried automatically."""
        self._since = self.now()


class SaveByTime(Callback):
    """Requests a save in the step after which the interval has passed on any rank."""

    def __init__(self, clock: SaveClock, keeper: CheckpointKeeper, args: Namespace) -> None:
        self.clock, self.keeper, self.args = clock, keeper, args

    def wants_save(self, step: Step, leaves: bool) -> bool:
        """Not while another is being written, nor after the last step, which Megatron saves."""
        is_due = self.clock.is_due() and not self.keeper.in_flight
        if leaves or step.iteration >= self.args.train_iters or not self.args.save:
            return False
        return self.keeper.job.any(is_due)

    def after_save(self, step: Step, is_saved: bool) -> None:
        """Count from here."""
        self.clock.restart()
