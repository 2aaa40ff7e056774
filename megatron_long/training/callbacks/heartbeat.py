"""Heartbeats for the watchdog, at the events; those of micro-batches come from `StepSettings`."""

from megatron_long.engine.callback import Callback, End, Step
from megatron_long.job.watchdog import LONG_PHASE, Watchdog


class Heartbeat(Callback):
    """Sends heartbeats before and after long phases, and stops the watchdog at the end."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog

    def after_step(self, step: Step) -> End | None:
        """The first step, which compiles kernels, is done."""
        self.watchdog.end_step()
        return None

    def before_save(self, step: Step) -> None:
        """A save takes long."""
        self.watchdog.beat(LONG_PHASE)

    def after_save(self, step: Step, is_saved: bool) -> None:
        """So may what follows: a retry, or the end of the run."""
        self.watchdog.beat(LONG_PHASE)

    def before_settle(self) -> None:
        """So does waiting for one."""
        self.watchdog.beat(LONG_PHASE)

    def after_settle(self) -> None:
        """Steps follow."""
        self.watchdog.beat()

    def on_end(self) -> None:
        """Nothing is left to watch."""
        self.watchdog.stop()
