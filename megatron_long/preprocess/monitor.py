"""How far a run is, whichever machine works: tasks leave files, a thread of the waiting run reads them."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import orjson

from megatron_long.corpus.inputs import InputFile
from megatron_long.mixture.corpus_stats import read_info
from megatron_long.mixture.rows import LengthCount

POLL_SECONDS = 0.5
EXPECTED_FILE = "expected.json"
"""In the work folder: an estimate of what each source will have, if there was a survey."""


@dataclass
class RunProgress:
    """What is done so far."""

    stage: str = ""
    """`tokens.N`: round N of tokenizing."""
    files_done: int = 0
    files_total: int = 0
    read_bytes: int = 0
    """Bytes of the corpus files (compressed, if they are)."""
    total_bytes: int = 0
    text_bytes: int = 0
    tokens: int = 0
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    expected_by_source: dict[str, int] = field(default_factory=dict)
    """Estimate of what each source will have at the end of the stage; empty without a survey."""


OnProgress = Callable[[RunProgress], object]


def no_progress(progress: RunProgress) -> None:
    """Report nothing."""


class Monitor:
    """Calls `on_progress` about every half second while a stage runs in the block, and when it is done."""

    def __init__(
        self, work: Path, stage: str, files: Sequence[InputFile], on_progress: OnProgress
    ) -> None:
        self._work, self._stage, self._on_progress = work, stage, on_progress
        self._num_files, self._total_bytes = len(files), sum(file.read_bytes for file in files)
        expected = work / EXPECTED_FILE
        self._expected = orjson.loads(expected.read_bytes()) if expected.exists() else {}
        self._done: dict[str, dict[str, Any]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if self._on_progress is not no_progress:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._on_progress is no_progress:
            return
        self._stop.set()
        self._thread.join()
        if kind is None:
            self._look()

    def _watch(self) -> None:
        wait_s = POLL_SECONDS
        while not self._stop.wait(wait_s):
            began = time.monotonic()
            self._look()
            # With tens of thousands of files a look takes a while: never more than 5% of the time.
            wait_s = max(POLL_SECONDS, 20 * (time.monotonic() - began))

    def _look(self) -> None:
        for folder in sorted((self._work / self._stage).glob("[0-9]*")):
            if folder.name not in self._done:
                self._done[folder.name] = _summary(read_info(folder))
        parts = list(self._done.values())
        for path in (self._work / "progress").glob(f"{self._stage}.*.json"):
            number = path.name.split(".")[-2]
            if number not in self._done:
                try:
                    parts.append(orjson.loads(path.read_bytes()))
                except (OSError, orjson.JSONDecodeError):
                    continue  # the file was just finished
        self._on_progress(self._add(parts))

    def _add(self, parts: Sequence[dict[str, Any]]) -> RunProgress:
        by_source: dict[str, int] = defaultdict(int)
        for part in parts:
            for name, tokens in (part["tokens_by_source"] or {}).items():
                by_source[name] += tokens
        return RunProgress(
            self._stage,
            len(self._done),
            self._num_files,
            sum(part["read_bytes"] for part in parts),
            self._total_bytes,
            sum(part["text_bytes"] for part in parts),
            sum(by_source.values()),
            dict(sorted(by_source.items())),
            self._expected,
        )


def _summary(info: dict[str, Any]) -> dict[str, Any]:
    by_source: dict[str, int] = defaultdict(int)
    for count in map(LengthCount._make, info["lengths"]):
        by_source[info["sources"][count.source]] += count.tokens
    return {
        "read_bytes": info["piece_bytes"],
        "text_bytes": info["text_bytes"],
        "tokens_by_source": dict(by_source),
    }
