"""Signs of life for the watchdog, at the events; micro-batches give theirs by `StepSettings`."""

from megatron_long.engine.callback import Callback, End, Step
from megatron_long.job.watchdog import LONG_PHASE, Watchdog


class Heartbeat(Callback):
    """Beats before and after what takes long, and stops the watchdog at the end."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog

    def after_step(self, step: Step) -> End | None:
        """The first step, which compiles kernels, is over."""
        self.watchdog.end_step()
        return None

    def before_save(self, step: Step) -> None:
        """A save takes long."""
        self.watchdog.beat(LONG_PHASE)

    def after_save(self, step: Step, is_saved: bool) -> None:
        """So may what follows it: another try, or the end of the run."""
        self.watchdog.beat(LONG_PHASE)

    def before_settle(self) -> None:
        """So does waiting for one."""
        self.watchdog.beat(LONG_PHASE)

    def after_settle(self) -> None:
        """Steps follow."""
        self.watchdog.beat()

    def on_end(self) -> None:
        """Nothing is to be watched any more."""
        self.watchdog.stop()
