"""Which checkpoint of a folder a reader uses: the requested one, or the newest; and whether it exists.

For evaluation and conversion. Training, which skips damaged ones, uses `choosing`.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_long.checkpoint.choosing import (
    RELEASE,
    has_checkpoint,
    has_metadata,
    iteration_folder,
    newest_iteration,
    no_metadata,
    saved_iterations,
)
from megatron_long.checkpoint.sidecars import no_checkpoint
from megatron_long.errors import ConfigError, DataError
from megatron_long.job.rendezvous import is_first_process

_log = logging.getLogger(__name__)


class Reader(NamedTuple):
    """A reader's names of flags, for messages."""

    flag: str
    """Names the folder."""
    step_flag: str
    """Names one of its checkpoints."""
    hf_remedy: str
    """What to do with a Hugging Face folder instead."""


EVALUATION = Reader("--checkpoint", "--ckpt-step", "give --backend hf too")
CONVERSION = Reader(
    "--input", "--iteration", "it can be used directly, or converted with hf-to-megatron"
)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint."""

    folder: Path
    """The folder of `--save`, with the files next to the checkpoints."""
    iteration: int | None
    """None for converted weights (`release`)."""

    @property
    def path(self) -> Path:
        """Its own folder."""
        return iteration_folder(self.folder, self.iteration)

    @property
    def name(self) -> str:
        """Its iteration, or `release`."""
        return RELEASE if self.iteration is None else str(self.iteration)


def split_checkpoint(path: Path) -> tuple[Path, int | None]:
    """Return the folder of checkpoints that a path names, and which of them (None: the newest).

    >>> split_checkpoint(Path("runs/64k/iter_0000600"))
    (PosixPath('runs/64k'), 600)
    >>> split_checkpoint(Path("runs/64k"))
    (PosixPath('runs/64k'), None)
    """
    number = re.fullmatch(r"iter_(\d{7,})", path.name)
    return (path.parent, int(number[1])) if number else (path, None)


def open_checkpoint(folder: Path, iteration: int | None = None, *, reader: Reader) -> Checkpoint:
    """Find a checkpoint without loading it; `choosing.check_whole` checks its files.

    Args:
        folder: The folder of `--save`.
        iteration: Which; None for the newest by the folder's records, or of those that exist.
    Raises: ConfigError: no checkpoint, or not the requested one. DataError: from the records.
    """
    if not has_checkpoint(folder):
        raise no_checkpoint(folder, reader.flag, reader.hf_remedy, reader.step_flag)
    if iteration is not None:
        asked = Checkpoint(folder, iteration)
        if has_metadata(asked.path):
            return asked
        raise ConfigError(
            f"{reader.step_flag} {iteration} is not in {folder} ({no_metadata(asked.path)}); there: "
            f"{_there(folder, reader)}"
        )
    newest, reports = newest_iteration(folder, reader.step_flag)
    if is_first_process():
        for report in reports:
            _log.warning("%s", report)
    found = Checkpoint(folder, newest)
    if has_metadata(found.path):
        return found
    raise DataError(
        f"{reader.flag} {folder} names {found.path.name}, and {no_metadata(found.path)}; copy the checkpoint "
        f"again, or choose with {reader.step_flag} one of: {_there(folder, reader)}"
    )


def _there(folder: Path, reader: Reader) -> str:
    names = [str(number) for number in reversed(saved_iterations(folder))]
    if has_metadata(folder / RELEASE):
        names.append(f"{RELEASE} (without {reader.step_flag})")
    return ", ".join(names) or "none"
