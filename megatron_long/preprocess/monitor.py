"""How far a run is, whichever machine works: a thread of the waiting run looks at what its tasks leave."""

import dataclasses
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
from megatron_long.preprocess.executors import Stage

POLL_SECONDS = 0.5
ESTIMATE_SECONDS = 5.0
"""The time left is estimated from at least so much work."""
EXPECTED_FILE = "expected.json"
"""In the work folder: an estimate of what each source will have, if there was a survey."""


@dataclass(frozen=True)
class RunProgress:
    """What is done so far, also before the run was resumed."""

    stage: str = ""
    """`tokens.N`: round N of tokenizing."""
    files_done: int = 0
    """Files of the corpus, or pieces of them; parts, when the dataset is written."""
    files_total: int = 0
    read_bytes: int = 0
    """Bytes of the corpus files (compressed, if they are)."""
    total_bytes: int = 0
    text_bytes: int = 0
    tokens: int = 0
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    expected_by_source: dict[str, int] = field(default_factory=dict)
    """Estimate of what each source will have at the end of the stage; empty without a survey."""
    seconds: float = 0.0
    """Since this run began with the stage."""
    resumed_tokens_by_source: dict[str, int] = field(default_factory=dict)
    """Made before that, by another run."""
    left_s: float | None = None
    """Estimate of the time left, if there is one."""
    is_finished: bool = False

    @property
    def resumed_tokens(self) -> int:
        """Tokens made by another run."""
        return sum(self.resumed_tokens_by_source.values())

    @property
    def share(self) -> float:
        """Share of the stage that is done; 0 if that is not known."""
        if self.total_bytes:
            return self.read_bytes / self.total_bytes
        return self.files_done / max(self.files_total, 1)


OnProgress = Callable[[RunProgress], object]
Look = Callable[[], RunProgress]


def no_progress(progress: RunProgress) -> None:
    """Report nothing."""


class Monitor:
    """Calls `on_progress` about every half second while a stage runs in the block, and when it is done."""

    def __init__(self, stage: str, on_progress: OnProgress, look: Look = RunProgress) -> None:
        """Args: look: Says how far the stage is; without it, only time is told."""
        self._stage, self._on_progress, self._look = stage, on_progress, look
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._before = RunProgress()
        self._began = 0.0
        self._first: tuple[float, float] | None = None

    def __enter__(self) -> Self:
        if self._on_progress is not no_progress:
            self._before, self._began = self._look(), time.monotonic()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._on_progress is no_progress:
            return
        self._stop.set()
        self._thread.join()
        if kind is None:
            self._tell(is_finished=True)

    def _watch(self) -> None:
        wait_s = POLL_SECONDS
        while not self._stop.wait(wait_s):
            began = time.monotonic()
            self._tell()
            # With tens of thousands of files a look takes a while: never more than 5% of the time.
            wait_s = max(POLL_SECONDS, 20 * (time.monotonic() - began))

    def _tell(self, is_finished: bool = False) -> None:
        now, seconds = self._look(), time.monotonic() - self._began
        progress = dataclasses.replace(
            now,
            stage=self._stage,
            seconds=seconds,
            resumed_tokens_by_source=self._before.tokens_by_source,
            left_s=0.0 if is_finished else self._estimate(now.share, seconds),
            is_finished=is_finished,
        )
        self._on_progress(progress)

    def _estimate(self, share: float, seconds: float) -> float | None:
        """Estimate the time left from what was done since the first work was seen: processes start slowly."""
        if self._first is None and share > self._before.share:
            self._first = share, seconds
        if self._first is None or share <= self._first[0]:
            return None
        took = seconds - self._first[1]
        return (1 - share) * took / (share - self._first[0]) if took >= ESTIMATE_SECONDS else None


def count_done(stage: Stage, count: int) -> Look:
    """Give a function that counts the finished items of a stage."""
    return lambda: RunProgress(
        files_done=sum(stage.is_done(index) for index in range(count)), files_total=count
    )


class TokenizeLook:
    """Says how far tokenizing is."""

    def __init__(self, work: Path, stage: str, files: Sequence[InputFile]) -> None:
        self._work, self._stage = work, stage
        self._num_files, self._total_bytes = len(files), sum(file.read_bytes for file in files)
        expected = work / EXPECTED_FILE
        self._expected = orjson.loads(expected.read_bytes()) if expected.exists() else {}
        self._done: dict[str, dict[str, Any]] = {}
        for path in (work / "progress").glob(f"{stage}.*.json"):
            path.unlink(missing_ok=True)  # of a run that was killed: its file starts again

    def __call__(self) -> RunProgress:
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
        return self._add(parts)

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
