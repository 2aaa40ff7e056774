"""The context of a phase: its commands, what it removes, the records of earlier phases."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.walk.children import Child, Ended, run
from benchmarks.walk.settings import Work


@dataclass
class Context:
    """The context of a phase."""

    work: Work
    name: str
    commands: list[list[str]] = field(default_factory=list)
    lines: list[tuple[float, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.work.folder / "logs" / f"{self.name}.log"

    def run(
        self,
        command: Sequence[object],
        *,
        environment: dict[str, str] | None = None,
        watch: Callable[[Child], bool] | None = None,
    ) -> Ended:
        """Run a command, with its output in the phase's log."""
        words = [str(word) for word in command]
        shown = [f"{name}={value}" for name, value in (environment or {}).items()]
        self.commands.append([*shown, *words])
        given = self.work.environment() | (environment or {})
        ended = run(words, self.log, given, deadline=self.work.deadline, watch=watch)
        self.lines += ended.lines
        return ended

    def remove(self, path: Path, why: str) -> None:
        """Delete what later phases do not need, and log it."""
        if path.exists():
            self.notes.append(f"removed {path} ({why})")
            print(f"{self.name}: {self.notes[-1]}", flush=True)
            shutil.rmtree(path)


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The newest record of each phase."""
    path = folder / "records.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return {record["phase"]: record for record in map(json.loads, lines)}
