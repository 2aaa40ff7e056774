"""A finished dataset goes to where it was asked to be; a file system that refuses is an error of the user."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_long.corpus.inputs import file_system, is_url
from megatron_long.errors import ConfigError
from megatron_long.files import atomic_path, move_into_place


def publish(folder: Path, output: Path | str) -> None:
    """Put the finished dataset in its place; at a URL the manifest comes last."""
    if not is_url(output):
        output = os.path.realpath(output)  # a link stays, and leads to the dataset
        try:
            move_into_place(folder, Path(output))
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            with atomic_path(Path(output), directory=True) as copy:
                _copy(folder, copy)
        return
    system, target = file_system(str(output))
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    for name in sorted(names, key=lambda name: name == "manifest.json"):
        system.makedirs(f"{target}/{name}".rpartition("/")[0], exist_ok=True)
        system.put_file(str(folder / name), f"{target}/{name}")


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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(
                f"{error.filename or work}: no space left ({error.strerror}); make room and give the same "
                "command again, which resumes where it was"
            ) from None
        if error.errno == errno.EFBIG:
            raise ConfigError(
                f"{error.filename or work}: no file may grow that large ({error.strerror}); raise the "
                "limit (ulimit -f, or another file system for --work-dir) and give the same command "
                "again, which resumes where it was"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise ConfigError(
                f"--output: {error.filename or work} cannot be written ({error.strerror}); give a folder "
                "that can"
            ) from None
        raise
