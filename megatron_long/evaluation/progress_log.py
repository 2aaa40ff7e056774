"""What an evaluation has done, one JSON line each, so that a stopped run resumes where it was.

The first line holds the settings; a run with other settings does not touch the file. A line cut short by
a kill is dropped, and so are damaged ones, with a warning: what they held is done again. One job at a time
works in a folder, and its rank 0 alone reads and writes the file.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_type_hints

from megatron_long.differences import differences, format_differences
from megatron_long.errors import ConfigError, UserError
from megatron_long.files import append_whole, atomic_path
from megatron_long.job import rendezvous

SHOWN_DIFFERENCES = 3
LOCK = ".lock"

_log = logging.getLogger(__name__)


@contextmanager
def shared_log[T](
    path: Path, settings: Mapping[str, Any], kind: type[T], *, force: bool, reads_only: bool = False
) -> Iterator[list[T]]:
    """Hold the folder of a log, and give every process of the job what rank 0 finds in it.

    Args:
        path: The log, in the folder of `--output-dir`.
        settings: What decides the results.
        kind: Dataclass of the records.
        force: Forget what is there.
        reads_only: Nothing will be written: another job may work in the folder.
    Raises: ConfigError: another job works there, or see `open_log`.
    """
    with ExitStack() as stack:

        def claim() -> list[str]:
            if not reads_only:
                stack.enter_context(_only_job(path.parent))
            records = [] if force else open_log(path, settings, kind, "--output-dir")
            return [json.dumps(vars(record)) for record in records]

        yield [kind(**json.loads(line)) for line in rendezvous.from_first(claim)]


@contextmanager
def _only_job(folder: Path) -> Iterator[None]:
    """Hold a folder until the block ends; the file stays, so that nobody holds one that is gone."""
    with writing(folder / LOCK):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "w")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--output-dir {folder}: another job is writing its results there; wait for it, end it, "
                "or give another place"
            ) from None
        except OSError as error:
            _log.warning(
                "%s knows no locks (%s): start no second job there", folder, error.strerror
            )
        yield


def open_log[T](path: Path, settings: Mapping[str, Any], kind: type[T], flag: str) -> list[T]:
    """Give the records that a run with the same settings has written.

    Args:
        settings: What decides the results.
        kind: Dataclass of the records.
        flag: The flag that names the output, for errors.
    Raises: ConfigError: the file belongs to a run with other settings, or is none of ours.
    """
    if not path.exists():
        return []
    try:
        head, *lines = path.read_bytes().split(b"\n")
        seen = dict(_parse(head)["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{flag}: {path} is not a record of this version ({error!r}); give another place, or "
            "--force to start over"
        ) from error
    _check_same(seen, _plain(settings), f"{flag} {path.parent}")
    # A line without its line break was being written when the run was killed.
    found = [_read_record(kind, line) for line in lines[:-1]]
    records = [record for record in found if record is not None]
    if len(records) < len(found):
        _log.warning(
            "%s: %d of %d lines are damaged and left out; what they held is done again",
            path,
            len(found) - len(records),
            len(found),
        )
    return records


def start_log(
    path: Path, settings: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> None:
    """Write the file anew with the records that are kept.

    Raises: UserError: it cannot be written.
    """
    with writing(path), atomic_path(path) as temporary:
        temporary.write_text(_lines([{"settings": _plain(settings)}, *records]), encoding="utf-8")


def append_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add records; they are on the disk when this returns.

    Raises: UserError: they cannot be written.
    """
    with writing(path):
        append_whole(path, _lines(records))
        with path.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of a result that cannot be written what is kept.

    Raises: UserError: an `OSError` came, as of a full disk.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); results that were written before are "
            "kept: make room, or see who may write there, and the same command resumes from them"
        ) from error


def _parse(line: bytes) -> Any:
    """Read a line of JSON; `ValueError` says that it is none."""
    try:
        return json.loads(line.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _read_record[T](kind: type[T], line: bytes) -> T | None:
    """Give a line as a record; None where it is damaged."""
    try:
        record = kind(**_parse(line))
    except (ValueError, TypeError):
        return None
    fits = (isinstance(vars(record)[name], hint) for name, hint in get_type_hints(kind).items())
    return record if all(fits) else None


def _lines(records: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as JSON gives them back."""
    return json.loads(json.dumps(settings))


def _check_same(seen: dict[str, Any], asked: dict[str, Any], place: str) -> None:
    found = differences(seen, asked, asked | seen)[:SHOWN_DIFFERENCES]
    if found:
        shown = format_differences(found, _short, "{} {} there, {} here")
        raise ConfigError(
            f"{place} holds results of another command ({shown}); repeat that command, give another "
            "place, or --force to start over"
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
