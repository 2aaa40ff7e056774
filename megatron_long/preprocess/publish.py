"""A finished dataset goes to where it was asked to be; a file system that refuses is an error of the user.

At a URL `manifest.json` is uploaded last, so an upload that did not come to its end is no dataset.
The work folder keeps which objects are there, with the store's own tag of each, for the next start to go on.
"""

import errno
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from megatron_long.corpus.inputs import is_url
from megatron_long.corpus.stores import AT_START, attempt, file_system
from megatron_long.dataset.manifest import MANIFEST_FILE
from megatron_long.errors import ConfigError
from megatron_long.files import atomic_path, move_into_place, refuse_overwrite
from megatron_long.hashing import hash_file

UPLOADED_FILE = "uploaded.json"
WRITE_TEST = ".write-test"
BUCKETS = {"s3", "gs", "gcs", "abfs", "az"}
"""Stores without folders, where fsspec's `makedirs` would create a bucket of a misspelt name."""


def publish(folder: Path, output: Path | str, work: Path, *, force: bool = False) -> None:
    """Put the finished dataset in its place, whole; at a URL, objects that are there already are kept.

    Raises: ConfigError: something else is there and `force` is not given, or the store fails.
    """
    if is_url(output):
        _upload(folder, str(output).rstrip("/"), work, force)
        return
    refuse_overwrite(Path(output), force=force)  # another run may have made it meanwhile
    place = Path(os.path.realpath(output))  # a link stays, and leads to the dataset
    try:
        move_into_place(folder, place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with atomic_path(place, directory=True) as copy:
            _copy(folder, copy)


def check_url(url: str, work: Path, *, force: bool) -> None:
    """Check, before the corpus is read, that a dataset can be written to a URL.

    Raises: ConfigError: no, or something is there already; an unfinished upload from `work` may be.
    """
    system, target = file_system(url.rstrip("/"))
    if "/" not in target.lstrip("/"):
        raise ConfigError(
            f"--output {url} names no folder in the bucket; give {url.rstrip('/')}/NAME"
        )

    def check() -> None:
        _refuse_others(url, _names(system, target), _uploaded(work, url), force)
        _make_folder(system, target)
        system.pipe_file(f"{target}/{WRITE_TEST}", b"")
        system.rm_file(f"{target}/{WRITE_TEST}")

    attempt(f"--output {url}", check, AT_START)


def _upload(folder: Path, url: str, work: Path, force: bool) -> None:
    system, target = file_system(url)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    def retried[Result](action: Callable[[Any, str], Result], name: str) -> Result:
        return attempt(f"--output {url}", lambda: action(system, f"{target}/{name}".rstrip("/")))

    before, there = _uploaded(work, url), retried(_names, "")
    _refuse_others(url, there, before, force)
    # The manifest first: from here on, what is there is no dataset.
    for name in sorted(there - (names - {MANIFEST_FILE}), key=lambda name: name != MANIFEST_FILE):
        retried(lambda system, path: system.rm_file(path), name)
    objects: dict[str, Any] = dict.fromkeys(names - {MANIFEST_FILE})
    for name in sorted(objects):
        digest, known = hash_file(folder / name).xxh3_128, before.get(name)
        if not (known and known[0] == digest and name in there and known[1] == retried(_tag, name)):
            _keep(work, url, objects)
            put = functools.partial(_put, folder / name)
            known = [digest, retried(put, name)]
        objects[name] = known
        _keep(work, url, objects)
    for name, (_, tag) in sorted(objects.items()):
        if retried(_tag, name) != tag:
            raise ConfigError(
                f"--output {url}: another program changed {name} during the upload; end it, and give the "
                "same command again"
            )
    _keep(work, url, objects | {MANIFEST_FILE: None})
    retried(functools.partial(_put, folder / MANIFEST_FILE), MANIFEST_FILE)
    (work / UPLOADED_FILE).unlink()


def _put(path: Path, system: Any, target: str) -> list[Any]:
    _make_folder(system, target.rpartition("/")[0])
    system.put_file(str(path), target)
    found = _tag(system, target)
    if found[0] != path.stat().st_size:
        raise OSError(f"{target} has {found[0]} bytes after an upload of {path.stat().st_size}")
    return found


def _make_folder(system: Any, path: str) -> None:
    protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
    if not protocols & BUCKETS:
        system.makedirs(path, exist_ok=True)


def _tag(system: Any, path: str) -> list[Any]:
    """Return the size of an object, and what changes when somebody writes it again."""
    system.invalidate_cache()
    detail = system.info(path)
    tag = detail.get("ETag") or detail.get("mtime") or detail.get("created") or ""
    return [int(detail["size"]), str(tag)]


def _names(system: Any, target: str) -> set[str]:
    """Return the objects below a path."""
    system.invalidate_cache()
    names = {path.removeprefix(target).lstrip("/") for path in system.find(target)}
    return names - {"", WRITE_TEST}


def _refuse_others(url: str, there: set[str], ours: dict[str, Any], force: bool) -> None:
    others = there - ours.keys()
    if force or not others:
        return
    what = "exists already" if MANIFEST_FILE in there else f"holds {min(others)}"
    raise ConfigError(
        f"--output {url} {what}; results are never overwritten silently: give another URL, or --force to "
        "replace all that is there"
    )


def _uploaded(work: Path, url: str) -> dict[str, Any]:
    """Return what an earlier start uploaded; None for an object that may be there."""
    path = work / UPLOADED_FILE
    content = orjson.loads(path.read_bytes()) if path.exists() else {}
    return content["objects"] if content.get("url") == url.rstrip("/") else {}


def _keep(work: Path, url: str, objects: dict[str, Any]) -> None:
    with atomic_path(work / UPLOADED_FILE) as temporary:
        temporary.write_bytes(orjson.dumps({"url": url, "objects": objects}))


def _copy(folder: Path, copy: Path) -> None:
    """Copy a folder; unlike `copytree`, an error tells its cause."""
    for path in sorted(folder.rglob("*")):
        target = copy / path.relative_to(folder)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            shutil.copy2(path, target)


@contextmanager
def interrupts() -> Iterator[None]:
    """Let Ctrl-C say that the work is not lost."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command resumes where it was") from None


@contextmanager
def disk_errors(work: Path) -> Iterator[None]:
    """Turn failures of the file system into errors of the user."""
    try:
        yield
    except OSError as error:
        place = error.filename2 or error.filename or work  # of a copy, where it goes
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(
                f"{place}: no space left ({error.strerror}); make room and give the same "
                "command again, which resumes where it was"
            ) from None
        if error.errno == errno.EFBIG:
            raise ConfigError(
                f"{place}: no file may grow that large ({error.strerror}); raise the "
                "limit (ulimit -f, or another file system for --work-dir) and give the same command "
                "again, which resumes where it was"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise ConfigError(
                f"--output: {place} cannot be written ({error.strerror}); give a folder that can"
            ) from None
        raise
