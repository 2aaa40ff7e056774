"""Hashes of every file of a checkpoint, written with it and checked before it is loaded.

    DIR/hashes.json                hf_config.json, tokenizer/, run.json; the newest iteration
    DIR/iter_0000100/hashes.json   all files of that checkpoint

Each `hashes.json` contains a hash of itself, so that every byte is checked. Threads read the files (xxh3
releases the GIL), and in a job each process reads a share of them.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from megatron_long.checkpoint.sidecars import (
    GENERATION_CONFIG_NAME,
    HF_CONFIG_NAME,
    RUN_NAME,
    TOKENIZER_DIR_NAME,
)
from megatron_long.errors import DataError
from megatron_long.files import atomic_path, remove_path
from megatron_long.hashing import FileInfo, hash_file
from megatron_long.job.rendezvous import is_first_process

HASHES_NAME = "hashes.json"
READERS = 8
"""Files that one process reads concurrently."""
_SELF = "xxh3_128_of_this_file"

logger = logging.getLogger(__name__)


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, FileInfo]:
    """Return size and hash of files by their name relative to `folder`, read in parallel."""
    ordered = sorted(names)
    with ThreadPoolExecutor(READERS) as pool:
        infos = pool.map(lambda name: hash_file(folder / name), ordered)
        return dict(zip(ordered, infos, strict=True))


def files_within(folder: Path) -> list[str]:
    """Return the names of all files under a folder, including hidden ones, except its `hashes.json`."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != HASHES_NAME)


def sidecar_files(folder: Path) -> list[str]:
    """Return the names of the files next to the checkpoints that later starts need."""
    kept = (HF_CONFIG_NAME, GENERATION_CONFIG_NAME, RUN_NAME)
    names = [name for name in kept if (folder / name).is_file()]
    tokenizer = folder / TOKENIZER_DIR_NAME
    return names + [f"{TOKENIZER_DIR_NAME}/{name}" for name in files_within(tokenizer)]


def write_hashes(
    folder: Path, infos: Mapping[str, FileInfo], facts: Mapping[str, Any] | None = None
) -> None:
    """Write `hashes.json` atomically.

    Args:
        facts: Other values that the file's own hash covers.
    """
    files = {name: asdict(infos[name]) for name in sorted(infos)}
    content = {**(facts or {}), "files": files}
    with atomic_path(folder / HASHES_NAME) as temporary:
        temporary.write_bytes(_serialize(content))


def leave_shard_hashes(folder: Path, rank: int, infos: Mapping[str, FileInfo]) -> None:
    """Record what a process has written and hashed, in a hidden file next to an unfinished checkpoint.

    Only that rank touches the file, so that a listing of the folder which is out of date names no file that
    is gone.

    Args:
        rank: The process; a helper of it may write the file.
    """
    content = {name: asdict(info) for name, info in infos.items()}
    _shard_hashes(folder, rank).write_text(json.dumps(content), encoding="utf-8")


def take_shard_hashes(folder: Path, rank: int) -> dict[str, FileInfo] | None:
    """Read and remove that file.

    Returns: Size and hash of each shard by its name; None if the writer left none, or a damaged file.
    """
    path = _shard_hashes(folder, rank)
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return None
    path.unlink()
    try:
        return {name: FileInfo(**info) for name, info in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        return None


def _shard_hashes(folder: Path, rank: int) -> Path:
    return folder.with_name(f"{folder.stem}.{rank}{folder.suffix}")


def remove_unfinished(folder: Path) -> None:
    """Remove an unfinished checkpoint with the records next to it, if they exist."""
    remove_path(folder)
    for record in folder.parent.glob(f"{folder.stem}.*{folder.suffix}"):
        remove_path(record)


def write_sidecar_hashes(folder: Path, latest: int | str | None) -> None:
    """Record the files next to the checkpoints, and which checkpoint is the newest.

    Args:
        latest: Its iteration, `release` for converted weights, None if there is none yet.
    """
    write_hashes(folder, hash_files(folder, sidecar_files(folder)), {"latest": latest})


def read_hashes(folder: Path) -> dict[str, Any]:
    """Read `hashes.json`: `files` with the `FileInfo` of each, and other facts.

    Raises: DataError: it is missing or damaged; the message begins with its path.
    """
    path = folder / HASHES_NAME
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
        del content[_SELF]
        if raw != _serialize(content):  # every byte, including blanks
            raise DataError(f"{path} is damaged: its own hash does not match")
        files = {name: FileInfo(**info) for name, info in content["files"].items()}
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    return content | {"files": files}


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Compare the files of a folder with its `hashes.json`.

    Args:
        part, parts: Which share of the files to read, of how many; shares hold about as many bytes.
    Returns: The problems, one sentence each; empty if there are none.
    """
    try:
        files = read_hashes(folder)["files"]
    except DataError as error:
        return [str(error)]
    mine = _share(files, part, parts)
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda name: _compare(folder / name, files[name]), mine)
        return [damage for damage in found if damage]


def find_missing(folder: Path) -> list[str]:
    """Compare names and sizes of the files of a folder with its `hashes.json`, without reading them.

    Returns: The problems, one sentence each; empty if there is no `hashes.json` to compare with.
    """
    if not (folder / HASHES_NAME).exists():
        return []
    try:
        files = read_hashes(folder)["files"]
    except DataError as error:
        return [str(error)]
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda name: _compare_size(folder / name, files[name]), sorted(files))
        return [damage for damage in found if damage]


def check_sidecars(folder: Path) -> None:
    """Refuse files next to the checkpoints that have changed since they were written.

    A folder without `hashes.json`, or with a damaged one, is accepted: there is nothing to compare with.
    `run.json` is informational: no start needs it, so a damaged one is only reported.

    Raises: DataError: names the file and the remedy.
    """
    try:
        files = read_hashes(folder)["files"]
    except DataError:
        return
    for name, info in files.items():
        damage = _compare(folder / name, info)
        if damage and name == RUN_NAME:
            if is_first_process():
                logger.warning("%s; it is not required, and the next run here rewrites it", damage)
        elif damage:
            raise DataError(
                f"{damage}; restore the file (the folder that the run started from has it too), "
                f"or, if the change is intended, delete {folder / HASHES_NAME}"
            )


def _serialize(content: Mapping[str, Any]) -> bytes:
    own = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    return json.dumps({**content, _SELF: own}, indent=1, sort_keys=True).encode() + b"\n"


def _share(files: Mapping[str, FileInfo], part: int, parts: int) -> list[str]:
    """Files assigned by decreasing size, each to the part that has the fewest bytes.

    >>> infos = {name: FileInfo(size, "") for name, size in {"a": 9, "b": 5, "c": 3, "d": 2}.items()}
    >>> _share(infos, 0, 2), _share(infos, 1, 2)
    (['a'], ['b', 'c', 'd'])
    """
    loads = [0] * parts
    mine = []
    for name in sorted(files, key=lambda name: (-files[name].size_bytes, name)):
        lightest = loads.index(min(loads))
        loads[lightest] += files[name].size_bytes
        if lightest == part:
            mine.append(name)
    return mine


def _compare(path: Path, info: FileInfo) -> str | None:
    damage = _compare_size(path, info)
    if damage:
        return damage
    try:
        seen = hash_file(path).xxh3_128
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error})"
    return None if seen == info.xxh3_128 else f"{path} is damaged: its hash has changed"


def _compare_size(path: Path, info: FileInfo) -> str | None:
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error})"
    if size_bytes != info.size_bytes:
        return f"{path} has {size_bytes:,} bytes instead of {info.size_bytes:,}"
    return None
