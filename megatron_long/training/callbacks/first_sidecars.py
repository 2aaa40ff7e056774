"""The files next to the checkpoints: written before the first step, when Megatron has accepted everything."""

from collections.abc import Callable
from pathlib import Path

from megatron_long.checkpoint.saving import Job
from megatron_long.engine.callback import Callback, Step
from megatron_long.training.start import Start, record_sidecars, unwritable


class WriteSidecars(Callback):
    """Writes and hashes them, on the first rank; all ranks fail if that fails.

    Args:
        save: `--save`; without it nothing is written.
        write: Puts the files there.
    """

    def __init__(
        self, job: Job, save: Path | None, start: Start, write: Callable[[Path], None]
    ) -> None:
        self.job, self.save, self.start, self.write = job, save, start, write

    def before_training(self, step: Step) -> None:
        """Write.

        Raises: ConfigError: a file could not be written.
        """
        if self.save is None:
            return
        reason = None
        try:
            if self.job.rank == 0:
                self.write(self.save)
                record_sidecars(self.save, self.start)
        except OSError as error:
            reason = str(error)
        reasons = [found for found in self.job.gather(reason) if found]
        if reasons:
            raise unwritable(self.save, reasons[0])
