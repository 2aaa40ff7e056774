"""Resources of this machine other than GPUs: host memory within its cgroups, and free disk."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60
"""Version 1 of cgroups writes no limit as a number about this large."""


@dataclass(frozen=True)
class Room:
    """Available bytes, and the source of the figure."""

    free_bytes: float
    where: str


def host_memory(root: Path = Path("/")) -> Room | None:
    """Host memory still available to this process and its peers; page cache counts as free.

    The minimum of `MemAvailable` and of every limit of this process's cgroup (versions 1 and 2) and of the
    groups that contain it, as set by SLURM and containers. Some virtual machines grow their memory on
    demand, so the figure can be too small: use it for warnings, not for errors.

    Args:
        root: Folder that contains `proc` and `sys`.
    Returns: None if the system reports neither.
    """
    rooms = [*_available(root), *_limits(root)]
    return min(rooms, key=lambda room: room.free_bytes, default=None)


def free_disk(folder: Path) -> Room | None:
    """Free bytes of the file system of an existing or future folder; quotas are not detected.

    Returns: None if the system does not report it.
    """
    for path in (folder.absolute(), *folder.absolute().parents):
        try:
            return Room(float(shutil.disk_usage(path).free), str(path))
        except FileNotFoundError:
            continue
        except OSError:
            break
    return None


def gigabytes(size_bytes: float) -> str:
    """A size as text, with a suitable unit.

    >>> gigabytes(112.4e9), gigabytes(3.21e6)
    ('112 GB', '3.2 MB')
    """
    unit, name = (1e9, "GB") if size_bytes >= 1e9 else (1e6, "MB")
    return f"{size_bytes / unit:.{0 if size_bytes >= 10 * unit else 1}f} {name}"


def _available(root: Path) -> Iterator[Room]:
    values = _table(root / "proc" / "meminfo")
    if "MemAvailable:" in values:
        yield Room(1024.0 * values["MemAvailable:"], "MemAvailable")


def _limits(root: Path) -> Iterator[Room]:
    """Space below each limit on the path from this process's groups to the roots of their trees."""
    fields = (line.split(":", 2) for line in _lines(root / "proc" / "self" / "cgroup"))
    groups = {controllers: path for _, controllers, path in (f for f in fields if len(f) == 3)}
    trees = root / "sys" / "fs" / "cgroup"
    for controllers, path in groups.items():
        if controllers == "":
            yield from _walk(trees, path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            tree, limit = trees / "memory", "memory.limit_in_bytes"
            yield from _walk(tree, path, limit, "memory.usage_in_bytes", "total_")


def _walk(tree: Path, path: str, limit: str, usage: str, prefix: str) -> Iterator[Room]:
    group = tree / path.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(tree):
            return
        most, used = _number(folder / limit), _number(folder / usage)
        if most is None or used is None or most >= _UNLIMITED:
            continue
        cache = _table(folder / "memory.stat")
        kept = sum(cache.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
        yield Room(float(max(0, most - used + kept)), f"{folder / limit} {most}")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _number(path: Path) -> int | None:
    """The number in a file; None for `max`, or without a file."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    """Names and numbers of lines like `MemAvailable: 12 kB`."""
    words = (line.split() for line in _lines(path))
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdecimal()}
