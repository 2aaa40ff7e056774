"""The stages that run on many processes: tokenize files of the corpus, write parts of the dataset."""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_long.corpus.inputs import InputFile
from megatron_long.errors import DataError
from megatron_long.files import atomic_path, process_mark
from megatron_long.freed_memory import give_memory_back, keep_batch_memory
from megatron_long.mixture.selection import CHOSEN_DTYPE
from megatron_long.pickles import AllowList, read_pickle
from megatron_long.preprocess.tokenize_file import (
    TOKENS_FILE,
    FileProgress,
    TokenizeOptions,
    tokenize_file,
)
from megatron_long.tokenizer.engines import release_engine
from megatron_long.tokenizer.loading import load_tokenizer
from megatron_long.tokenizer.tokenizer_types import Tokenizer

PART_TOKENS = 32 << 20
"""Tokens of a part, about: what one task of the second stage holds in memory."""
PROGRESS_SECONDS = 0.5
_JOBS: AllowList = {
    "megatron_long.preprocess.stages": ("TokenizeJob", "WriteJob"),
    "megatron_long.corpus.inputs": ("InputFile",),
    "megatron_long.preprocess.tokenize_file": ("TokenizeOptions",),
    "megatron_long.corpus.documents": ("RecordKeys",),
    "megatron_long.mixture.admission": ("Admission", "Limits"),
    "numpy": ("dtype",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),  # of Python 3.13
}
"""What a job is made of."""


@dataclass(frozen=True)
class TokenizeJob:
    """What the tasks of the first stage need to know."""

    files: list[InputFile]
    tokenizer: Path
    engine: str
    options: TokenizeOptions


def item_folder(tokens: Path, index: int) -> Path:
    """Where what is made of item `index` lies in the folder of the first stage."""
    return tokens / f"{index:06d}"


@dataclass(frozen=True)
class TokenizeStage:
    """Item i is file i of the corpus, or piece i if there are large files."""

    work: Path
    round: int

    @property
    def name(self) -> str:
        """The name of the stage, in the work folder."""
        return f"tokens.{self.round}"

    @property
    def job_path(self) -> Path:
        """Where the job lies."""
        return self.work / f"{self.name}.job"

    def folder(self, index: int) -> Path:
        """What is made of file `index`."""
        return item_folder(self.work / self.name, index)

    def is_done(self, index: int) -> bool:
        """Tell whether a file is done."""
        return self.folder(index).exists()

    def run(self, index: int) -> None:
        """Tokenize a file."""
        keep_batch_memory()
        job: TokenizeJob = _load_job(self.job_path, self.job_path.stat().st_mtime_ns)
        tokenizer = _open_tokenizer(job.tokenizer, job.engine)
        report = _reporter(self.work / "progress" / f"{self.name}.{index:06d}.json")
        tokenize_file(job.files[index], index, tokenizer, job.options, self.folder(index), report)


@dataclass(frozen=True)
class WriteJob:
    """What the tasks of the second stage need to know."""

    order: Path
    parts: list[tuple[int, int]]
    """First row and end of each part."""
    tokens: Path
    """Folder of the first stage."""
    dtype: np.dtype
    bos_id: int | None
    eod_id: int


@dataclass(frozen=True)
class WriteStage:
    """Item i is part i of the training tokens."""

    work: Path
    name: str = "parts"

    @property
    def job_path(self) -> Path:
        """Where the job lies."""
        return self.work / "parts.job"

    def path(self, index: int) -> Path:
        """The file of a part."""
        return self.work / self.name / f"{index:06d}.bin"

    def is_done(self, index: int) -> bool:
        """Tell whether a part is written."""
        return self.path(index).exists()

    def run(self, index: int) -> None:
        """Write a part."""
        job: WriteJob = _load_job(self.job_path, self.job_path.stat().st_mtime_ns)
        start, stop = job.parts[index]
        order = np.memmap(job.order, CHOSEN_DTYPE, "r")
        with atomic_path(self.path(index)) as temporary:
            # Not `tofile`, whose error on a full disk does not tell the cause.
            temporary.write_bytes(gather_tokens(np.array(order[start:stop]), job).data)


def gather_tokens(rows: NDArray, job: WriteJob) -> NDArray:
    """Give the tokens of rows one after another, each with BOS (if any) and EOD.

    Files are opened one by one, and read forward, for a cluster's file system has no time for more.

    Args:
        rows: Rows with `file`, `offset` and `length_tokens`.
    """
    lengths = rows["length_tokens"].astype(np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    tokens = np.empty(int(ends[-1]) if len(ends) else 0, job.dtype)
    if job.bos_id is not None:
        tokens[starts] = job.bos_id
    tokens[ends - 1] = job.eod_id  # after BOS: a document cut to one token is EOD alone
    has_bos = int(job.bos_id is not None)
    order = np.lexsort((rows["offset"], rows["file"]))
    size, places = job.dtype.itemsize, memoryview(tokens).cast("B")
    for group in np.split(order, np.flatnonzero(np.diff(rows["file"][order])) + 1):
        if not len(group):
            continue
        path = item_folder(job.tokens, int(rows["file"][group[0]])) / TOKENS_FILE
        begins = ((starts[group] + has_bos) * size).tolist()
        stops = ((ends[group] - 1) * size).tolist()
        offsets = (rows["offset"][group].astype(np.int64) * size).tolist()
        with open(path, "rb", buffering=0) as file:
            number = file.fileno()
            for begin, stop, offset in zip(begins, stops, offsets, strict=True):
                _read_into(number, places[begin:stop], offset, path)
    return tokens


def _read_into(number: int, place: memoryview, offset: int, path: Path) -> None:
    """Fill a part of an array from an open file; one read may give less than was asked."""
    while len(place):
        count = os.preadv(number, [place], offset)
        if not count:
            raise DataError(f"{path} is cut off; start again with --force")
        place, offset = place[count:], offset + count


def split_parts(order: NDArray, part_tokens: int = PART_TOKENS) -> list[tuple[int, int]]:
    """Divide rows into parts of about `part_tokens` tokens, each at least one row."""
    parts, start, tokens = [], 0, 0
    for first in range(0, len(order), 1 << 18):
        lengths = np.array(order["length_tokens"][first : first + (1 << 18)], np.int64)
        for row, end in enumerate(np.cumsum(lengths).tolist(), first + 1):
            if tokens + end >= part_tokens:
                parts.append((start, row))
                start, tokens = row, -end
        tokens += int(lengths.sum())
    return parts + ([(start, len(order))] if start < len(order) else [])


@functools.lru_cache(maxsize=4)
def _load_job(path: Path, modified_ns: int) -> Any:
    with path.open("rb") as file:
        return read_pickle(file, _JOBS)


_TOKENIZERS: dict[tuple[Path, str], Tokenizer] = {}
"""Those that this process has open, by their file and engine."""


def keep_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Tokenize with an open tokenizer, where this process itself runs the items."""
    _TOKENIZERS[path, tokenizer.engine_name] = tokenizer


def forget_tokenizers() -> None:
    """Free what tokenizing has left in this process: what follows needs memory of its own."""
    for tokenizer in _TOKENIZERS.values():
        release_engine(tokenizer)
    _TOKENIZERS.clear()
    give_memory_back()


def _open_tokenizer(path: Path, engine: str) -> Tokenizer:
    if (path, engine) not in _TOKENIZERS:
        _TOKENIZERS[path, engine] = load_tokenizer(path, engine)
    return _TOKENIZERS[path, engine]


def _reporter(path: Path) -> Callable[[FileProgress], None]:
    """Give a function that leaves the progress of a file where the waiting run looks for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    last = time.monotonic()

    def report(progress: FileProgress) -> None:
        nonlocal last
        if progress.done:
            path.unlink(missing_ok=True)
        elif time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            temporary = path.with_name(f".{path.name}.{process_mark()}.tmp")
            temporary.write_bytes(orjson.dumps(asdict(progress)))
            os.replace(temporary, path)

    return report
