"""Atomic files and folders: write next to the target, fsync, rename."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import xxhash

from megatron_long.errors import ConfigError

REPLACED_SUFFIX = ".old"
"""Suffix of a folder that is being replaced."""


@contextlib.contextmanager
def atomic_path(path: Path, *, directory: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that is renamed to `path` when the block succeeds.

    On an exception the temporary file or folder is removed and `path` is unchanged. An existing
    file is replaced; an existing folder is swapped out and removed after the new one is in place.

    Args:
        path: The final name; its parent folder is created if missing.
        directory: Whether the target is a folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{process_mark()}.tmp")
    remove_path(temporary)
    try:
        if directory:
            temporary.mkdir()
        yield temporary
        _sync(temporary)
        _replace(temporary, path)
    except BaseException:
        remove_path(temporary)
        raise


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a finished file or folder of the same file system to `path`, replacing an existing one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sync(temporary)
    _replace(temporary, path)


def append_whole(path: Path, text: str) -> None:
    """Append text to a file, created if missing; a failed write leaves the file unchanged.

    Raises: OSError: it could not be written, as on a full disk.
    """
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        left = memoryview(text.encode("utf-8"))
        try:
            while left:
                left = left[file.write(left) or 0 :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def refuse_overwrite(path: Path, *, force: bool, flag: str = "--output") -> None:
    """Raise unless `path` is free, an empty folder, or `force` is given.

    Raises: ConfigError: `path` exists and is not empty.
    """
    if force or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    raise ConfigError(
        f"{flag} {path} exists already; results are never overwritten silently: "
        "give another path, or --force to replace it"
    )


def process_mark() -> str:
    """Return eight characters for names of temporary files, which differ between processes of a cluster.

    The number of a process does not: in containers on two nodes it is often the same.
    """
    return xxhash.xxh32_hexdigest(f"{os.uname().nodename} {os.getpid()}".encode())


def _replace(temporary: Path, path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        old = path.with_name(f".{path.name}.{process_mark()}{REPLACED_SUFFIX}")
        try:
            os.rename(path, old)
            os.rename(temporary, path)
            shutil.rmtree(old)
        except BaseException:  # a signal: one of the two folders has the name, complete
            if not path.exists():
                os.rename(old, path)
            shutil.rmtree(old, ignore_errors=True)
            raise
    else:
        os.replace(temporary, path)
    _sync_one(path.parent)


def _sync(path: Path) -> None:
    if path.is_dir():
        for child in sorted(path.rglob("*")):
            _sync_one(child)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_path(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder; if this is interrupted, nothing partial is left under its name."""
    doomed = path.with_name(f".{path.name}.{process_mark()}.tmp")
    remove_path(doomed)
    path.rename(doomed)
    shutil.rmtree(doomed)
