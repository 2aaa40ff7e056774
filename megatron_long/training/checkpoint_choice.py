"""Which checkpoint a run goes on from: the newest that is whole, every file of it checked.

The order is that of the run: what `hashes.json` beside the checkpoints records as newest (the tracker file,
where that record is missing), then earlier iterations. A damaged one is reported and passed over.
"""

import contextlib
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_long.errors import ConfigError, DataError
from megatron_long.files import remove_path
from megatron_long.training.checkpoint_folder import TRACKER_NAME
from megatron_long.training.checkpoint_hashes import HASHES_NAME, find_damage, read_hashes

RELEASE = "release"
SKIP_HASH_CHECK = "--skip-hash-check"
"""Flag of the tools that read checkpoints."""
PARTIAL_SUFFIX, DELETED_SUFFIX, DAMAGED_SUFFIX = ".partial", ".deleted", ".damaged"
_ITERATION = re.compile(r"iter_(\d{7,})")

Agree = Callable[[list[str]], list[str]]
"""Gives all processes of a job what each has found."""


@dataclass(frozen=True)
class Choice:
    """A checkpoint to load, and what was wrong with those before it."""

    iteration: int | None
    """None for converted weights (`release`)."""
    folder: Path
    reports: tuple[str, ...] = ()
    checked: bool = True
    """False where the checkpoint carries no hashes, as those of other programs."""


def iteration_folder(folder: Path, iteration: int | None) -> Path:
    """Where a checkpoint lies.

    >>> iteration_folder(Path("ckpt"), 12).as_posix()
    'ckpt/iter_0000012'
    """
    return folder / (RELEASE if iteration is None else f"iter_{iteration:07d}")


def saved_iterations(folder: Path) -> list[int]:
    """Iterations that have a folder, whole or not, newest first."""
    matches = (_ITERATION.fullmatch(path.name) for path in folder.glob("iter_*") if path.is_dir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def newest_iteration(folder: Path, flag: str = "--ckpt-step") -> tuple[int | None, list[str]]:
    """The newest checkpoint by the folder's records, unchecked.

    Args:
        flag: What names another one.
    Returns: Its iteration (None for converted weights), and what is wrong with the records.
    Raises: ConfigError: the folder holds no checkpoint.
    """
    tracked, reports = _read_tracker(folder)
    recorded: int | str | None = None
    if (folder / HASHES_NAME).exists():
        try:
            recorded = read_hashes(folder)["latest"]
        except (DataError, KeyError) as error:
            reports.append(str(error))
    if recorded is not None and tracked != recorded:
        seen = f"names {tracked}" if tracked is not None else "is no use"
        reports.append(
            f"{folder / TRACKER_NAME} {seen}, and the newest checkpoint of this run is {recorded}, "
            f"which is taken; to go back, give {flag}"
        )
    newest = recorded if recorded is not None else tracked
    if newest is None:
        newest = next(iter(saved_iterations(folder)), None)
    if newest is None and (folder / RELEASE).is_dir():
        newest = RELEASE
    if newest is not None:
        return (None if newest == RELEASE else int(newest)), reports
    raise ConfigError(
        f"{folder} holds no Megatron checkpoint: {TRACKER_NAME} is not there; give the "
        "folder that tools/convert_checkpoint.py or a training run wrote"
    )


def has_checkpoint(folder: str | Path | None) -> bool:
    """Whether a folder holds any checkpoint, whole or not."""
    if not folder:
        return False
    path = Path(folder)
    return bool(
        (path / TRACKER_NAME).exists() or saved_iterations(path) or (path / RELEASE).is_dir()
    )


def choose_checkpoint(
    folder: Path,
    step: int | None = None,
    *,
    share: tuple[int, int] = (0, 1),
    agree: Agree = list,
) -> Choice:
    """Find the checkpoint to load; all its files are read and compared with their hashes.

    Args:
        folder: What `--load` names.
        step: `--ckpt-step`: this one or none.
        share: Which part of the files this process reads, of how many.
        agree: See `Agree`.
    Raises: ConfigError: nothing there. DataError: no checkpoint is whole.
    """
    reports: list[str] = []
    if step:
        candidates: Sequence[int | None] = [step]
    else:
        newest, reports = newest_iteration(folder)
        earlier = [number for number in saved_iterations(folder) if number < (newest or 0)]
        candidates = [newest, *earlier]
        if newest is not None and (folder / RELEASE).is_dir():
            candidates = [*candidates, None]
    hashed = any((iteration_folder(folder, item) / HASHES_NAME).exists() for item in candidates)
    for iteration in candidates:
        path = iteration_folder(folder, iteration)
        if not hashed and path.is_dir():
            return Choice(iteration, path, tuple(reports), checked=False)
        damage = agree(find_damage(path, *share))
        if not damage:
            return Choice(iteration, path, tuple(reports))
        reports += sorted(set(damage))
    listed = "; ".join(reports)
    raise DataError(
        f"{folder} holds no checkpoint that is whole: {listed}. Copy it again, or take another folder"
    )


def check_whole(path: Path, *, share: tuple[int, int] = (0, 1), agree: Agree = list) -> bool:
    """Compare one checkpoint with its hashes, for readers whom no other one would serve.

    Args:
        path: Its own folder, `iter_0000100` or `release`.
        share, agree: See `choose_checkpoint`.
    Returns: False where there is nothing to compare, as for checkpoints of other programs.
    Raises: DataError: names each file that is damaged, and the other checkpoints beside it.
    """
    others = [iteration_folder(path.parent, number) for number in saved_iterations(path.parent)]
    others = [other for other in others if other != path]
    if not any((item / HASHES_NAME).exists() for item in (path, *others)):
        return False
    damage = sorted(set(agree(find_damage(path, *share))))
    if damage:
        there = ", ".join(other.name for other in others) or "there is none"
        raise DataError(
            f"{'; '.join(damage)}. Copy the checkpoint again, take another one of this run ({there}), or "
            f"read what is there with {SKIP_HASH_CHECK}"
        )
    return True


def set_aside(folder: Path, choice: Choice) -> None:
    """Rename what is newer than the checkpoint taken, so that it is not met again."""
    for iteration in saved_iterations(folder):
        path = iteration_folder(folder, iteration)
        if any(report.startswith(str(path) + "/") for report in choice.reports):
            target = path.with_name(path.name + DAMAGED_SUFFIX)
            remove_path(target)
            path.rename(target)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left of checkpoints it was writing or deleting."""
    for path in folder.glob(".iter_*"):
        if path.name.endswith((PARTIAL_SUFFIX, DELETED_SUFFIX)):
            shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, newest: int, keep_last: int, keep_every: int | None) -> list[int]:
    """Delete checkpoints of this run that are not to be kept.

    Args:
        newest: The one just written; later ones are not this run's and stay.
        keep_last: How many to keep, the newest included.
        keep_every: Keep multiples of this too.
    Returns: Iterations deleted.
    """
    own = [number for number in saved_iterations(folder) if number <= newest]
    doomed = [n for n in own[keep_last:] if not keep_every or n % keep_every]
    for iteration in doomed:
        path = iteration_folder(folder, iteration)
        gone = path.with_name(f".{path.name}{DELETED_SUFFIX}")
        with contextlib.suppress(OSError):
            path.rename(gone)  # half deleted, it must not look like a checkpoint
            shutil.rmtree(gone)
    return doomed


def _read_tracker(folder: Path) -> tuple[int | str | None, list[str]]:
    path = folder / TRACKER_NAME
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None, []
    except (OSError, UnicodeDecodeError) as error:
        return None, [f"{path} is damaged ({type(error).__name__})"]
    if text == RELEASE:
        return RELEASE, []
    if text.isascii() and text.isdecimal():
        return int(text), []
    return None, [f"{path} is damaged: it holds {text[:20]!r}"]
