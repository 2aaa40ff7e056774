"""Which checkpoint a run resumes from: the newest complete one, with every file checked.

The order is that of the run: what `hashes.json` next to the checkpoints records as newest (the tracker file,
if that record is missing), then earlier iterations. A damaged one is reported and skipped. A folder
without complete metadata is not a checkpoint: it is never chosen, counted or deleted.
"""

import contextlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_long.checkpoint.hashes import HASHES_NAME, find_damage, find_missing, read_hashes
from megatron_long.checkpoint.sidecars import (
    HF_CONFIG_NAME,
    HF_MODEL_CONFIG,
    TRACKER_NAME,
    no_checkpoint,
)
from megatron_long.errors import ConfigError, DataError
from megatron_long.files import REPLACED_SUFFIX, remove_path

RELEASE = "release"
SKIP_HASH_CHECK = "--skip-hash-check"
"""Flag of the tools that read checkpoints."""
PARTIAL_SUFFIX, DELETED_SUFFIX, DAMAGED_SUFFIX = ".partial", ".deleted", ".damaged"
METADATA_NAME, INDEX_NAME = "metadata.json", ".metadata"
"""Files of Megatron's `torch_dist` format: the former is written last, the latter locates each tensor."""
_ITERATION = re.compile(r"iter_(\d{7,})")

Agree = Callable[[list[str]], list[str]]
"""Returns to all processes of a job what each has found."""
FromFirst = Callable[[Callable[[], list[str]]], list[str]]
"""Returns to all processes what the first one computes: a listing of a shared folder may lag on others."""


@dataclass(frozen=True)
class Choice:
    """A checkpoint to load, and what was wrong with those before it."""

    iteration: int | None
    """None for converted weights (`release`)."""
    folder: Path
    reports: tuple[str, ...] = ()
    checked: bool = True
    """False if the checkpoint has no hashes, as those of other programs."""


def iteration_folder(folder: Path, iteration: int | None) -> Path:
    """The folder of a checkpoint.

    >>> iteration_folder(Path("ckpt"), 12).as_posix()
    'ckpt/iter_0000012'
    """
    return folder / (RELEASE if iteration is None else f"iter_{iteration:07d}")


def has_metadata(path: Path) -> bool:
    """Whether a folder is a checkpoint at all; its hashes show whether its tensors are complete.

    An interrupted save leaves a folder without metadata.

    Args:
        path: Its own folder, `iter_0000100` or `release`.
    """
    try:
        whole = isinstance(json.loads((path / METADATA_NAME).read_bytes()), dict)
        if whole and (path / INDEX_NAME).stat().st_size:
            return True
    except (OSError, ValueError, RecursionError):
        pass
    return any(path.glob("mp_rank_*/*.pt"))  # Megatron's old format, of other programs


def saved_iterations(folder: Path) -> list[int]:
    """Iterations that have a checkpoint, newest first; see `has_metadata`."""
    return [number for number in _folders(folder) if has_metadata(iteration_folder(folder, number))]


def _folders(folder: Path) -> list[int]:
    """Iterations that have a folder with any content, newest first."""
    matches = (_ITERATION.fullmatch(path.name) for path in folder.glob("iter_*") if path.is_dir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def newest_iteration(folder: Path, flag: str = "--ckpt-step") -> tuple[int | None, list[str]]:
    """The newest checkpoint by the folder's records, unchecked.

    Args:
        flag: The flag that selects another one.
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
        seen = f"names {tracked}" if tracked is not None else "is not usable"
        reports.append(
            f"{folder / TRACKER_NAME} {seen}, and the newest checkpoint of this run is {recorded}, "
            f"which is used; to use an earlier one, give {flag}"
        )
    newest = recorded if recorded is not None else tracked
    if newest is None:
        there = saved_iterations(folder)
        newest = there[0] if there else RELEASE if has_metadata(folder / RELEASE) else None
        if len(there) > 1:
            reports.append(
                f"no record in {folder} names its newest checkpoint: {newest} is used, the highest of those "
                f"there; to use another one, give {flag}"
            )
    if newest is not None:
        return (None if newest == RELEASE else int(newest)), reports
    raise ConfigError(
        f"{folder} holds no Megatron checkpoint: {TRACKER_NAME} is missing; give the "
        "folder that tools/convert_checkpoint.py or a training run wrote"
    )


def has_checkpoint(folder: str | Path | None) -> bool:
    """Whether a folder holds a checkpoint, or records one: a lost one is reported, never started over."""
    if not folder:
        return False
    path = Path(folder)
    if (path / TRACKER_NAME).exists() or saved_iterations(path) or has_metadata(path / RELEASE):
        return True
    try:
        return read_hashes(path).get("latest") is not None
    except DataError:
        return False


def find_remains(folder: Path) -> list[Path]:
    """Leftovers of interrupted saves under a checkpoint's own name, except empty folders."""
    folders = (iteration_folder(folder, number) for number in _folders(folder))
    return [path for path in folders if not has_metadata(path) and any(path.iterdir())]


def choose_checkpoint(
    folder: Path,
    step: int | None = None,
    *,
    share: tuple[int, int] = (0, 1),
    agree: Agree = list,
    from_first: FromFirst = lambda compute: compute(),
) -> Choice:
    """Find the checkpoint to load; all its files are read and compared with their hashes.

    Args:
        folder: The value of `--load`.
        step: `--ckpt-step`: this one or none.
        share: Which part of the files this process reads, of how many.
        agree, from_first: See `Agree` and `FromFirst`.
    Raises: ConfigError: the folder is empty. DataError: no checkpoint is complete.
    """
    (found,) = from_first(lambda: [json.dumps(_candidates(folder, step))])
    candidates, hashed, reports = json.loads(found)
    for iteration in candidates:
        path = iteration_folder(folder, iteration)
        if not hashed and has_metadata(path):
            return Choice(iteration, path, tuple(reports), checked=False)
        damage = agree(find_damage(path, *share) if hashed else [no_metadata(path)])
        if not damage:
            return Choice(iteration, path, tuple(reports))
        reports += sorted(set(damage))
    listed = "; ".join(reports)
    raise DataError(
        f"{folder} holds no complete checkpoint: {listed}. Copy it again, or use another folder"
    )


def _candidates(folder: Path, step: int | None) -> tuple[list[int | None], bool, list[str]]:
    """Iterations to try, in order; whether any has hashes; and what is wrong with the folder's records."""
    reports: list[str] = []
    candidates: list[int | None] = [step]
    if step and not iteration_folder(folder, step).is_dir():
        there = ", ".join(map(str, saved_iterations(folder))) or "none"
        raise ConfigError(
            f"--ckpt-step {step}: {folder} has no checkpoint of that step; it has {there}. Give one of "
            "these, or drop the flag to use the newest"
        )
    if not step:
        newest, reports = newest_iteration(folder)
        earlier = [number for number in saved_iterations(folder) if number < (newest or 0)]
        candidates = [newest, *earlier]
        if newest is not None and has_metadata(folder / RELEASE):
            candidates.append(None)
    hashed = any((iteration_folder(folder, item) / HASHES_NAME).exists() for item in candidates)
    return candidates, hashed, reports


def require_checkpoint(folder: Path, flag: str, *, is_saved_to: bool = False) -> None:
    """Refuse a folder that holds no checkpoint, without reading any tensor.

    Args:
        flag: The flag that names the folder.
        is_saved_to: Whether this run would save there, so that its first checkpoint does not exist yet.
    Raises: ConfigError: there is none and none is recorded. DataError: no recorded one has its metadata.
    """
    if not has_checkpoint(folder):
        if is_saved_to and not (folder / HF_MODEL_CONFIG).is_file():
            raise ConfigError(
                f"{flag} {folder} holds no checkpoint yet, and this run has no other start: give "
                "--pretrained-checkpoint with the folder of tools/convert_checkpoint.py, or --hf-checkpoint, "
                f"which is used until {flag} holds one, or drop {flag} to start from random weights"
            )
        raise no_checkpoint(
            folder,
            flag,
            "start from it with --hf-checkpoint, or convert it with tools/convert_checkpoint.py",
        )
    candidates, _, _ = _candidates(folder, None)
    paths = [iteration_folder(folder, iteration) for iteration in candidates]
    if not any(has_metadata(path) for path in paths):
        raise DataError(
            f"{flag} {folder} holds no complete checkpoint: {no_metadata(paths[0])}. Copy it again, or "
            f"take another folder; to start over, remove {folder}"
        )


def describe_view(folders: Sequence[str | None]) -> str:
    """Describe the checkpoint folders as this process sees them, to compare with other processes."""
    seen = []
    for folder in map(Path, filter(None, folders)):
        config = "with" if (folder / HF_CONFIG_NAME).is_file() else "without"
        text = f"no checkpoint in {folder}"
        if has_checkpoint(folder):
            with contextlib.suppress(ConfigError):
                path = iteration_folder(folder, newest_iteration(folder)[0])
                text = f"{path} {'with' if has_metadata(path) else 'without'} metadata"
        seen.append(f"{text}, {config} {HF_CONFIG_NAME}")
    return "; ".join(seen)


def no_metadata(path: Path) -> str:
    """Explain why a folder is not a checkpoint."""
    if not path.is_dir():
        return f"{path} is missing"
    return f"{path}/ has no complete {METADATA_NAME} and {INDEX_NAME}: it is not a checkpoint"


def check_whole(path: Path, *, share: tuple[int, int] = (0, 1), agree: Agree = list) -> bool:
    """Compare one checkpoint with its hashes, for readers that cannot use another one.

    Args:
        path: Its own folder, `iter_0000100` or `release`.
        share, agree: See `choose_checkpoint`.
    Returns: False if there is nothing to compare, as for checkpoints of other programs.
    Raises: DataError: names each file that is damaged, and the other checkpoints next to it.
    """
    others = [iteration_folder(path.parent, number) for number in saved_iterations(path.parent)]
    others = [other for other in others if other != path]
    hashed = any((item / HASHES_NAME).exists() for item in (path, *others))
    if not hashed and has_metadata(path):
        return False
    damage = sorted(set(agree(find_damage(path, *share) if hashed else [no_metadata(path)])))
    if damage:
        there = ", ".join(other.name for other in others) or "there is none"
        raise DataError(
            f"{'; '.join(damage)}. Copy the checkpoint again, use another one of this run ({there}), or "
            f"read what is there with {SKIP_HASH_CHECK}"
        )
    return True


def set_aside(folder: Path, choice: Choice) -> None:
    """Rename checkpoints newer than the one chosen, so that they are not found again."""
    for iteration in _folders(folder):
        path = iteration_folder(folder, iteration)
        if any(report.startswith(str(path) + "/") for report in choice.reports):
            target = path.with_name(path.name + DAMAGED_SUFFIX)
            remove_path(target)
            path.rename(target)


def remove_leftovers(folder: Path) -> None:
    """Remove leftovers of a killed process that was writing, replacing or deleting checkpoints."""
    for path in folder.glob(".iter_*"):
        if path.name.endswith((PARTIAL_SUFFIX, DELETED_SUFFIX, REPLACED_SUFFIX)):
            with contextlib.suppress(OSError):
                remove_path(path)
    for iteration in _folders(folder):
        with contextlib.suppress(OSError):
            iteration_folder(folder, iteration).rmdir()  # only where it is empty


def prune(folder: Path, newest: int, keep_last: int, keep_every: int | None) -> list[int]:
    """Delete checkpoints of this run that are not to be kept, if the new one is complete.

    Only complete ones count: metadata, and every file that `hashes.json` lists, with its size. Anything else
    is neither counted nor deleted.

    Args:
        newest: The one just written; later ones are not this run's and stay.
        keep_last: How many to keep, the newest included.
        keep_every: Keep multiples of this too.
    Returns: Iterations deleted.
    """
    own = [number for number in saved_iterations(folder) if number <= newest]
    whole = (n for n in own if not find_missing(iteration_folder(folder, n)))
    kept = list(itertools.islice(whole, keep_last))
    if kept[:1] != [newest] or len(kept) < keep_last:
        return []
    doomed = [n for n in own if n < kept[-1] and (not keep_every or n % keep_every)]
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
