"""How checkpoints are saved: written to a hidden folder, hashed, renamed; old ones deleted.

A failed save (a full disk) is reported and retried after some steps; training continues. All
processes make the same decisions: each error is first exchanged with the others.
"""

import contextlib
import itertools
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_long.checkpoint.choosing import (
    PARTIAL_SUFFIX,
    has_metadata,
    no_metadata,
    prune,
    saved_iterations,
)
from megatron_long.checkpoint.hashes import (
    files_within,
    hash_files,
    remove_unfinished,
    take_shard_hashes,
    write_hashes,
    write_sidecar_hashes,
)
from megatron_long.checkpoint.sidecars import TRACKER_NAME
from megatron_long.errors import DataError
from megatron_long.files import atomic_path, move_into_place
from megatron_long.hashing import FileInfo

TRAINING_NAME = "training.json"
"""In each checkpoint: what data it was trained on, and the state of the step guard."""
SHARD_SUFFIX = ".distcp"
FAULT_STATUS = 3
"""Exit status of a run that ended because of faulty steps or weights that are not finite."""
SAVE_FAILED_STATUS = 4
"""Exit status of a run whose last checkpoint could not be written."""
LAST_TRIES_S = (5.0, 15.0, 30.0)
"""Seconds to wait before each retry of a last save."""

logger = logging.getLogger(__name__)


class SaveFailed(Exception):
    """A checkpoint could not be written; raised by all processes."""


class Job(Protocol):
    """The other processes of this job."""

    @property
    def rank(self) -> int:
        """This process."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""

    def gather(self, item: Any) -> list[Any]:
        """The value of each process."""


class ErrorKeepingStream:
    """A stream whose writes never raise: the first error is kept, later writes are dropped.

    The traceback of a failed write holds a view of a `BytesIO`, in a cycle with the exception; collecting
    that ends CPython 3.12.1 with a segmentation fault. The error kept has no traceback.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, data: Any) -> int:
        """Write, or do nothing if a write has failed."""
        if self.error is None:
            try:
                return self.stream.write(data)
            except OSError as error:
                self.error = error.with_traceback(None)
        return len(data)

    def flush(self) -> None:
        """Flush, or do nothing if a write has failed."""
        if self.error is None:
            try:
                self.stream.flush()
            except OSError as error:
                self.error = error.with_traceback(None)


@dataclass
class CheckpointKeeper:
    """Writes, counts and deletes the checkpoints of one run."""

    job: Job
    save_dir: Path | None
    facts: Callable[[], Mapping[str, Any]]
    """Content of `training.json`."""
    keep_last: int | None = None
    keep_every: int | None = None
    pending: int | None = None
    """Iteration whose save has failed and is still to be retried."""
    tries: int = 0
    in_flight: deque[Path] = field(default_factory=deque)
    """Folders that are still being written in the background (`--async-save`), oldest first."""
    _retry_at: int = 0
    _errors: list[str] = field(default_factory=list)

    def note(self, error: BaseException) -> None:
        """Record an error of this process, to be exchanged with the others at the next opportunity."""
        self._errors.append(f"{type(error).__name__}: {error}")

    def write(self, final: Path, save: Callable[[Path], Any]) -> Any:
        """Let `save` fill a folder next to `final`, and rename it when it is complete.

        Args:
            save: Megatron's; returns a request with `finalize_fns` if it saves in the background.
        Raises: SaveFailed: on every process, if any of them had an error.
        """
        partial = final.with_name(f".{final.name}{PARTIAL_SUFFIX}")
        try:
            facts = self.facts()
            self._together(lambda: _make_empty(partial), only_first=True)
            request = save(partial)
            if request is None:
                self._finish(partial, final, facts)
            else:
                self.in_flight.append(partial)
                request.finalize_fns.append(lambda: self._arrive(partial, final, facts))
        except BaseException:  # torch's CheckpointException is not an Exception
            if self.job.rank == 0:  # the written part takes the space that the next try needs
                with contextlib.suppress(OSError):
                    remove_unfinished(partial)
            raise
        return request

    def attempt(self, iteration: int, save: Callable[[], None], failures: tuple) -> bool:
        """Save, and continue if that fails.

        Args:
            failures: Exceptions of the writer that all processes raise together.
        Returns: Whether it is saved, or being saved.
        """
        self._errors.clear()
        try:
            save()
        except (SaveFailed, *failures) as error:
            self._owe(iteration, iteration, error)
            return False
        if not self.in_flight:
            self.pending, self.tries = None, 0
        return True

    def complete(self, iteration: int, finalize: Callable[[], None], failures: tuple) -> None:
        """Let Megatron finalize saves written in the background, and continue if one failed.

        Args:
            iteration: The current one.
            finalize: Megatron's; stops at the first failed save, which it forgets.
            failures: See `attempt`.
        """
        self._errors.clear()
        while True:
            try:
                return finalize()
            except (SaveFailed, *failures) as error:
                partial = self.in_flight.popleft()
                self._owe(_number(partial), iteration, error)
                if self.job.rank == 0:
                    with contextlib.suppress(OSError):
                        remove_unfinished(partial)

    def _owe(self, saved: int, now: int, error: BaseException) -> None:
        self.tries += 1
        self.pending = saved
        self._retry_at = now + 2 ** min(self.tries - 1, 10)
        noted = {text for share in self.job.gather(self._errors) for text in share}
        self._errors.clear()
        if self.job.rank == 0:
            logger.error(
                "checkpoint of iteration %d could not be saved (%s); training continues, the next try is "
                "at iteration %d",
                *(saved, "; ".join(sorted(noted)) or _first_words(error), self._retry_at),
            )

    def is_due(self, iteration: int) -> bool:
        """Whether a failed save is to be retried now."""
        return self.pending is not None and not self.in_flight and iteration >= self._retry_at

    def insist(self, save: Callable[[], None], settle: Callable[[], None]) -> None:
        """Retry a last save a few times, because the process ends after it.

        Args:
            settle: Waits for saves in the background.
        Raises: SystemExit: with `SAVE_FAILED_STATUS`, if it still fails.
        """
        settle()
        for wait in LAST_TRIES_S:
            if self.pending is None:
                return
            time.sleep(wait)
            save()
            settle()
        if self.pending is not None:
            if self.job.rank == 0:
                saved = saved_iterations(self.save_dir) if self.save_dir else []
                newest = f"the newest is that of iteration {saved[0]}" if saved else "there is none"
                logger.error("the last checkpoint could not be saved; %s", newest)
            raise SystemExit(SAVE_FAILED_STATUS)

    def _arrive(self, partial: Path, final: Path, facts: Mapping[str, Any]) -> None:
        self._finish(partial, final, facts)
        self.in_flight.popleft()
        self.pending, self.tries = None, 0

    def _finish(self, partial: Path, final: Path, facts: Mapping[str, Any]) -> None:
        self._together(lambda: _write_facts(partial, facts), only_first=True)
        hashed: dict[str, FileInfo] = {}
        self._together(lambda: hashed.update(_shards_of(partial, self.job.rank)))
        shares = self.job.gather(hashed)
        infos = {name: info for share in shares for name, info in share.items()}
        self._together(lambda: _publish(partial, final, infos), only_first=True)
        if self.job.rank == 0 and final.parent == self.save_dir and self.keep_last:
            deleted = prune(final.parent, _number(final), self.keep_last, self.keep_every)
            if deleted:
                logger.info("deleted the checkpoints of iterations %s", deleted)

    def _together(self, action: Callable[[], object], *, only_first: bool = False) -> None:
        """Do something on each process or on the first; fail everywhere if it fails anywhere."""
        if self.job.rank == 0 or not only_first:
            try:
                action()
            except OSError as error:
                self.note(error)
        if not self.job.any(bool(self._errors)):
            return
        errors = [error for share in self.job.gather(self._errors) for error in share]
        self._errors.clear()
        raise SaveFailed("; ".join(sorted(set(errors))))


def read_facts(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's record of its training; empty for those of other programs.

    Raises: DataError: the file is damaged; with hashes, this was detected before.
    """
    path = folder / TRAINING_NAME
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise DataError(
            f"{path} is damaged: it holds no JSON object; copy the checkpoint again, or use another with "
            "--ckpt-step"
        )
    return facts


def _shards_of(folder: Path, rank: int) -> dict[str, FileInfo]:
    """Size and hash of each shard that a process wrote; another writer's are read again."""
    recorded = take_shard_hashes(folder, rank)
    return hash_files(folder, _written_by(folder, rank)) if recorded is None else recorded


def _written_by(folder: Path, rank: int) -> list[str]:
    """Names of the shards that a process wrote: they are in its node's cache, and always visible to it.

    Megatron's writers number those of a rank from 0 (`__3_0.distcp`, `__3_1.distcp`). They are opened by
    name, so that only the first process lists the folder: each listing is a request to a shared file system.
    """
    names = (f"__{rank}_{number}{SHARD_SUFFIX}" for number in itertools.count())
    return list(itertools.takewhile(lambda name: (folder / name).is_file(), names))


def _make_empty(folder: Path) -> None:
    remove_unfinished(folder)
    folder.mkdir(parents=True)


def _write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
    (folder / TRAINING_NAME).write_text(text, encoding="utf-8")


def _publish(partial: Path, final: Path, infos: Mapping[str, FileInfo]) -> None:
    rest = set(files_within(partial)) - set(
        infos
    )  # metadata, and files that a writer names differently
    write_hashes(partial, {**infos, **hash_files(partial, rest)})
    if not has_metadata(partial):
        raise OSError(f"{no_metadata(partial)} (it was to become {final})")
    move_into_place(partial, final)
    write_sidecar_hashes(final.parent, _number(final))
    with atomic_path(final.parent / TRACKER_NAME) as temporary:
        temporary.write_text(str(_number(final)), encoding="utf-8")


def _first_words(error: BaseException) -> str:
    """The error message; torch's exception contains whole tracebacks, of which the errors are used."""
    failures = getattr(error, "failures", None)
    causes = [str(cause) for cause, _ in failures.values()] if failures else [str(error)]
    return " ".join("; ".join(sorted(set(causes))).split())[:500]


def _number(folder: Path) -> int:
    """The iteration of `iter_0000012`, or of `.iter_0000012.partial`."""
    return int(folder.name.strip(".").removeprefix("iter_").removesuffix(PARTIAL_SUFFIX))
