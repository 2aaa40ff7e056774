"""Cells that are done, one JSON line each, so that a stopped needle run goes on where it was.

The first line holds the settings; a run with other settings does not touch the file. A line cut short by
a kill is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_long.errors import ConfigError
from megatron_long.evaluation.needle_report import NeedleSettings
from megatron_long.evaluation.needle_scores import NeedleResult
from megatron_long.files import atomic_path

SHOWN_DIFFERENCES = 3


def open_cell_log(path: Path, settings: NeedleSettings) -> list[NeedleResult]:
    """Give the cells that a run with the same settings has done.

    Raises: ConfigError: the file belongs to a run with other settings, or is none of ours.
    """
    if not path.exists():
        return []
    head, *lines = path.read_text(encoding="utf-8").split("\n")
    try:
        seen = json.loads(head)["settings"]
        # A line without its line break was being written when the run was killed.
        results = [NeedleResult(**json.loads(line)) for line in lines[:-1]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--output-dir: {path} is not a record of cells of this version ({error!r}); give "
            "another folder, or --force to start over"
        ) from error
    _check_same(seen, _identity(settings), path.parent)
    return list({result.key: result for result in results}.values())


def start_cell_log(path: Path, settings: NeedleSettings, done: Sequence[NeedleResult]) -> None:
    """Write the record anew with the cells that are kept."""
    lines = [{"settings": _identity(settings)}, *(asdict(result) for result in done)]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def append_cells(path: Path, results: Sequence[NeedleResult]) -> None:
    """Add cells; they are on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(asdict(result)) + "\n" for result in results))
        file.flush()
        os.fsync(file.fileno())


def _identity(settings: NeedleSettings) -> dict[str, Any]:
    """What decides the cells; how they are computed and drawn does not."""
    values = asdict(settings)
    for name in ("training_length", "layout_argv"):
        del values[name]
    return json.loads(json.dumps(values))


def _check_same(seen: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    names = [name for name in asked | seen if seen.get(name) != asked.get(name)]
    if names:
        shown = "; ".join(
            f"{name} {_short(seen.get(name))} there, {_short(asked.get(name))} here"
            for name in names[:SHOWN_DIFFERENCES]
        )
        raise ConfigError(
            f"--output-dir {folder} holds cells of another command ({shown}); repeat that command, "
            "give another folder, or --force to start over"
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
