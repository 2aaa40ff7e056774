"""Callbacks on the figures of a step: the loss log, and the end of suppressed startup output."""

import json
import logging
from pathlib import Path

from megatron_long.engine.callback import Callback, Log
from megatron_long.files import append_whole
from megatron_long.job.side_output import words_of
from megatron_long.job.start_log import StartLog

logger = logging.getLogger(__name__)


class EndStartLog(Callback):
    """Shows everything from the first step's line on."""

    def __init__(self, start_log: StartLog) -> None:
        self.start_log = start_log

    def on_log(self, log: Log) -> None:
        """The start is done."""
        self.start_log.end()


class LossLog(Callback):
    """Appends the unrounded figures of each step to a JSON-lines file, from one rank.

    Lines that cannot be written are kept, and are written as soon as there is space.
    """

    def __init__(self, path: Path, writes: bool) -> None:
        self.path = path
        self.writes = writes
        self.owed: list[str] = []

    def on_log(self, log: Log) -> None:
        """Append a line."""
        if not self.writes:
            return
        figures = {name: float(value) for name, value in log.losses.items()}
        record = {"iteration": log.iteration, **figures, "grad_norm": log.grad_norm}
        self.owed.append(json.dumps(record) + "\n")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_whole(self.path, "".join(self.owed))
        except OSError as error:
            if len(self.owed) == 1:
                logger.error(
                    "--loss-log %s could not be written (%s); training continues, and its lines follow",
                    *(self.path, words_of(error)),
                )
        else:
            if len(self.owed) > 1:
                logger.warning("--loss-log %s is written again, complete", self.path)
            self.owed.clear()
