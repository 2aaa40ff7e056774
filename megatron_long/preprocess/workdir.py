"""The work folder of a run: what it was asked, of which corpus, and what is done so far.

A run that was killed resumes when the same command is given again; another command, or a corpus that has
changed, is refused.
"""

import contextlib
import fcntl
import functools
import glob
import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from megatron_long.corpus.inputs import InputFile, hash_input
from megatron_long.differences import differences, format_differences
from megatron_long.errors import ConfigError, DataError
from megatron_long.files import atomic_path, remove_folder, remove_path
from megatron_long.mixture.admission import Admission
from megatron_long.mixture.corpus_stats import read_info
from megatron_long.preprocess.file_pieces import known_hashes
from megatron_long.tokenizer.tokenizer_files import CONFIG_FILES, tokenizer_file

COMMAND_FILE = "command.json"
OF_THE_PLAN = {
    "train_tokens",
    "short_keep_ratio",
    "long_token_share",
    "upsampled_shares",
    "source_shares",
    "missing_sources",
    "valid_tokens_per_source",
    "allow_repeat",
    "short_share",
}
"""Options of a mixture that decide what is taken of the tokens: other values use the same tokens."""
INPUTS_FILE = "inputs.json"


def open_work(
    work: Path, command: Mapping[str, Any], files: Sequence[InputFile], *, force: bool
) -> None:
    """Start a work folder, or resume one.

    Args:
        command: Everything that decides what the dataset will be, as plain data.
        force: Throw away unfinished work of another command or of another corpus.
    Raises: ConfigError: the folder belongs to another command. DataError: the corpus has changed.
    """
    command = orjson.loads(orjson.dumps(command))
    if (work / COMMAND_FILE).exists():
        try:
            _check_command(work, command)
            _check_inputs(work, files)
        except (ConfigError, DataError):
            if not force:
                raise
            remove_folder(work)
    _remove_removed(work)
    work.mkdir(parents=True, exist_ok=True)
    others = {path.name for path in work.iterdir() if not _is_leftover(path.name)} - {INPUTS_FILE}
    if others and not (work / COMMAND_FILE).exists():
        raise ConfigError(
            f"--work-dir {work} holds files of something else ({min(others)}), and is removed at the end; "
            "give a folder that is new or empty"
        )
    _remove_leftovers(work)
    if not (work / COMMAND_FILE).exists():
        listed = [[item.name, item.size_bytes, item.version] for item in files]
        write_json(work / INPUTS_FILE, listed)
        write_json(work / COMMAND_FILE, command)


@contextmanager
def only_run(work: Path) -> Iterator[None]:
    """Hold the work folder for one run.

    Raises: ConfigError: another run holds it.
    """
    work.parent.mkdir(parents=True, exist_ok=True)
    lock = work.with_name(f".{work.name}.lock")
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:  # removed by the run that held it
                raise BlockingIOError
        except OSError:
            raise ConfigError(
                f"another run is working in {work}; wait for it, or end it, or use another --output"
            ) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def sweep(work: Path) -> None:
    """Remove what a run left that was killed while it removed its work folder, unless a run is there."""
    if work.parent.is_dir():
        with contextlib.suppress(ConfigError, OSError), only_run(work):
            _remove_removed(work)


def _remove_removed(work: Path) -> None:
    for leftover in work.parent.glob(f".{glob.escape(work.name)}.*.tmp"):
        remove_path(leftover)


def check_unchanged(work: Path, files: Sequence[InputFile], now: Sequence[InputFile]) -> None:
    """Check at the end that the corpus is still the one that was read.

    Raises: DataError: a file has changed.
    """
    latest = {item.name: item for item in now}
    hashes = functools.cache(lambda: _known_hashes(work))
    for item in files:
        current = latest.get(item.name)
        if current is None or not _is_same(item, current, hashes):
            raise _changed(item.name, "changed while it was read")


def write_json(path: Path, content: Any) -> None:
    """Write plain data, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))


def read_limits(work: Path) -> tuple[int, Admission]:
    """Give the number of the latest round of tokenizing, and its limits."""
    number = max(int(path.suffix[1:]) for path in work.glob("admission.*"))
    content = orjson.loads((work / f"admission.{number}").read_bytes())
    return number, Admission.from_json(content)


def write_limits(work: Path, number: int, admission: Admission) -> None:
    """Keep the limits of a round of tokenizing."""
    write_json(work / f"admission.{number}", admission.to_json())


def write_pickle(path: Path, content: Any) -> None:
    """Write what the tasks of a stage need to know."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(pickle.dumps(content))


def hash_tokenizer(path: Path) -> str:
    """Hash the files of a tokenizer."""
    file = tokenizer_file(path)
    digest = hashlib.sha256(file.read_bytes())
    for name in CONFIG_FILES:
        if (file.parent / name).is_file():
            digest.update(name.encode() + (file.parent / name).read_bytes())
    return digest.hexdigest()


def _check_command(work: Path, command: Mapping[str, Any]) -> None:
    before = orjson.loads((work / COMMAND_FILE).read_bytes())
    found = differences(before, command, sorted({*before, *command}))
    if [(item.name, item.now) for item in found] == [("on_bad_document", "skip")]:
        write_json(work / COMMAND_FILE, command)  # what is done so far held no bad document
        return
    changed = differences(before.get("mixture", {}), command.get("mixture", {}))
    if [item.name for item in found] == ["mixture"] and {i.name for i in changed} <= OF_THE_PLAN:
        for name in ("plan", "parts", "dataset"):
            remove_path(work / name)
        write_json(work / COMMAND_FILE, command)
        return
    if found:
        raise ConfigError(
            f"{work} holds unfinished work of another command ({format_differences(found)}); give the "
            "same command to resume, another --output, or --force to throw the work away"
        )


def _check_inputs(work: Path, files: Sequence[InputFile]) -> None:
    before = [
        InputFile(name, "", size_bytes, version)
        for name, size_bytes, version in orjson.loads((work / INPUTS_FILE).read_bytes())
    ]
    now = {item.name: item for item in files}
    hashes = functools.cache(lambda: _known_hashes(work))
    for item in before:
        if item.name not in now:
            raise _changed(item.name, "is gone")
        if not _is_same(item, now[item.name], hashes):
            raise _changed(item.name, "is not what it was")
    added = sorted(set(now) - {item.name for item in before})
    if added:
        raise _changed(added[0], "is new")


def _is_same(before: InputFile, now: InputFile, hashes: Callable[[], dict[str, str]]) -> bool:
    """Compare by size and time; where only the time differs and the hash is known, by the hash."""
    if before.size_bytes != now.size_bytes:
        return False
    if before.version == now.version:
        return True
    known = hashes().get(before.name)
    return known is not None and known == hash_input(now)


def _known_hashes(work: Path) -> dict[str, str]:
    """Give the hashes of all files that were read to their end."""
    infos = map(read_info, sorted(work.glob("tokens.*/[0-9]*")))
    return known_hashes(work) | {info["name"]: info["xxh3_128"] for info in infos}


def _changed(name: str, what: str) -> DataError:
    return DataError(
        f"the corpus changed since this run was started: {name} {what}; put it back to resume, or start "
        "again with --force, which throws the unfinished work away"
    )


def _is_leftover(name: str) -> bool:
    return name.startswith(".") and name.endswith((".tmp", ".old"))


def _remove_leftovers(work: Path) -> None:
    """Remove temporary files of processes that were killed."""
    for folder, names, files in os.walk(work):
        for name in [*names, *files]:
            if _is_leftover(name):
                path = Path(folder) / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
