"""What an evaluation has done, one JSON line each, so that a stopped run goes on where it was.

The first line holds the settings; a run with other settings does not touch the file. A line cut short by
a kill is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_long.errors import ConfigError
from megatron_long.files import atomic_path

SHOWN_DIFFERENCES = 3


def open_log(path: Path, settings: Mapping[str, Any], flag: str) -> list[dict[str, Any]]:
    """Give the records that a run with the same settings has written.

    Args:
        settings: What decides the results.
        flag: The flag that names the output, for errors.
    Raises: ConfigError: the file belongs to a run with other settings, or is none of ours.
    """
    if not path.exists():
        return []
    head, *lines = path.read_text(encoding="utf-8").split("\n")
    try:
        seen = dict(json.loads(head)["settings"])
        # A line without its line break was being written when the run was killed.
        records = [dict(json.loads(line)) for line in lines[:-1]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{flag}: {path} is not a record of this version ({error!r}); give another place, or "
            "--force to start over"
        ) from error
    _check_same(seen, _plain(settings), f"{flag} {path.parent}")
    return records


def start_log(
    path: Path, settings: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> None:
    """Write the file anew with the records that are kept."""
    with atomic_path(path) as temporary:
        temporary.write_text(_lines([{"settings": _plain(settings)}, *records]), encoding="utf-8")


def append_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add records; they are on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_lines(records))
        file.flush()
        os.fsync(file.fileno())


def _lines(records: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as JSON gives them back."""
    return json.loads(json.dumps(settings))


def _check_same(seen: dict[str, Any], asked: dict[str, Any], place: str) -> None:
    names = [name for name in asked | seen if seen.get(name) != asked.get(name)]
    if names:
        shown = "; ".join(
            f"{name} {_short(seen.get(name))} there, {_short(asked.get(name))} here"
            for name in names[:SHOWN_DIFFERENCES]
        )
        raise ConfigError(
            f"{place} holds results of another command ({shown}); repeat that command, give another "
            "place, or --force to start over"
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
