"""Which files of `--input` are read, and why others are not.

A file is identified by its name relative to the user's path, so a corpus keeps its keys when it is moved.
Links are followed. What is reached twice within one `--input` is read once, without a link if possible.
"""

import dataclasses
import functools
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from megatron_long.corpus.inputs import (
    BYTE_ORDER_MARK,
    COMPRESSIONS,
    SUFFIXES,
    TABLES,
    InputFile,
    is_url,
    open_seekable,
    suffix_of,
)
from megatron_long.corpus.stores import AT_START, attempt, file_system
from megatron_long.errors import DataError

OTHER_COMPRESSIONS = (".bz2", ".xz", ".lzma", ".lz4", ".br", ".sz", ".snappy", ".zip", ".gzip")
OTHER_FORMATS = (".csv", ".tsv", ".feather", ".orc", ".avro", ".warc", ".tar", ".tgz", ".zip")
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2")
HF_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
HF_CACHE = "cache-*.arrow"
"""Results of `map` and row numbers of `shuffle`, which `datasets` keeps next to its data."""
HEAD_BYTES = 1 << 12
MOST_FOLDERS, MOST_NAMES = 20, 3
"""Listed at the start."""


class Skipped(NamedTuple):
    """A file (or folder) that is not read."""

    path: str
    reason: str
    remedy: str = ""
    """What to do about it, if documents are lost without it."""


@dataclass(frozen=True)
class Listing:
    """The files of a corpus."""

    files: list[InputFile]
    """By name."""
    skipped: list[Skipped]

    @property
    def lost(self) -> list[Skipped]:
        """What is likely to hold documents and is not read."""
        return [one for one in self.skipped if one.remedy]


OnListing = Callable[[Listing], object]


def no_listing(listing: Listing) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class _Entry:
    """What lies below an `--input`."""

    item: InputFile
    identity: str
    """Equal for all links to one file."""
    is_link: bool = False
    is_folder: bool = False
    is_named: bool = False
    """Given by `--input` itself."""
    problem: tuple[str, ...] = ()
    """Why it cannot be read, and a remedy if documents are lost without it."""


def find_inputs(paths: Sequence[Path | str], *, skip_unread: bool = False) -> list[InputFile]:
    """List the corpus files under `paths`, sorted by name; see `list_inputs`."""
    return list_inputs(paths, skip_unread=skip_unread).files


def list_inputs(paths: Sequence[Path | str], *, skip_unread: bool = False) -> Listing:
    """List the corpus files under `paths`, and the others.

    The name is relative to the folder given, or the base name of a file given. Equal names from several
    inputs get `#2`, `#3` in the order given.

    Raises: DataError: a path holds nothing to read, a file is named twice, or a file that is likely to hold
        documents cannot be read (unless `skip_unread`).
    """
    files: dict[str, InputFile] = {}
    seen: dict[str, str] = {}
    skipped: list[Skipped] = []
    for root in paths:
        taken, left = _sort_out(
            list(_list_url(str(root)) if is_url(root) else _list_local(Path(root)))
        )
        lost = [one for one in left if one.remedy]
        if lost and not skip_unread:
            raise _loses(lost)
        for entry in taken:
            if entry.identity in seen:
                raise DataError(
                    f"--input names {entry.item.path} twice (it is {seen[entry.identity]}); name every "
                    "file once"
                )
        seen |= {entry.identity: entry.item.path for entry in taken}
        if not taken:
            reason = f": it {left[0].reason}" if len(left) == 1 else ""
            raise DataError(f"--input {root} holds no corpus file ({', '.join(SUFFIXES)}){reason}")
        for item in sorted((entry.item for entry in taken), key=lambda item: item.name):
            name, count = item.name, 1
            while name in files:
                count += 1
                name = f"{item.name}#{count}"
            folder = item.name.partition("/")[0] if "/" in item.name else item.folder
            files[name] = InputFile(name, item.path, item.size_bytes, item.version, folder)
        skipped += left
    return Listing([files[name] for name in sorted(files)], skipped)


def describe_inputs(listing: Listing) -> Iterator[str]:
    """Yield lines that tell which files are read, by folder, and which are not, by reason."""
    yield f"--input: {_count(listing.files)}"
    folders: dict[str, list[InputFile]] = defaultdict(list)
    for item in listing.files:
        folders[item.folder].append(item)
    for folder, items in sorted(folders.items())[:MOST_FOLDERS]:
        kinds = {suffix_of(item.path) for item in items}
        yield f"  {_printable(folder)}: {_count(items)} ({', '.join(sorted(kinds))})"
    if len(folders) > MOST_FOLDERS:
        yield f"  and {len(folders) - MOST_FOLDERS:,} more folders"
    yield from describe_skipped(listing.skipped)


def describe_skipped(skipped: Iterable[Skipped]) -> Iterator[str]:
    """Yield a line for each reason why files are not read."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for path, reason, _ in skipped:
        reasons[reason].append(path.rpartition("/")[2])
    for reason, names in sorted(reasons.items()):
        some = sorted(set(names))
        shown = ", ".join(some[:MOST_NAMES]) + ", ..." * (len(some) > MOST_NAMES)
        yield f"not read: {len(names):,} x {shown}: {reason}"


def _count(items: Sequence[InputFile]) -> str:
    size, empty = sum(item.size_bytes for item in items), sum(not item.size_bytes for item in items)
    files = f"{len(items):,} file{'s' * (len(items) != 1)}, {size / 1e6:,.1f} MB"
    return files + f", {empty:,} empty" * bool(empty)


def _loses(lost: Sequence[Skipped]) -> DataError:
    first, *others = lost
    more = f" ({len(others):,} more are not read, such as {others[0].path})" if others else ""
    return DataError(
        f"--input: {first.path} {first.reason}; its documents would be missing{more}; {first.remedy}, or "
        "leave out such files with --on-unread-file skip"
    )


def _sort_out(entries: list[_Entry]) -> tuple[list[_Entry], list[Skipped]]:
    """Divide what lies below an `--input` into what is read and what is not."""
    taken, skipped = [], []
    parts, lost = _saved_datasets(entries)
    read: set[str] = set()
    for entry in sorted(entries, key=lambda entry: (entry.is_link, entry.item.name)):
        path, reason = entry.item.path, _why_not(entry, parts)
        if not reason and entry.is_link and entry.identity in read:
            reason = ("is read under another name",)
        if reason:
            skipped.append(Skipped(_printable(path), *reason))
        else:
            taken.append(entry)
            read.add(entry.identity)
    return taken, skipped + lost


def _why_not(entry: _Entry, parts: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return why a file is not read, and the remedy if its documents are lost; nothing if it is read."""
    path = entry.item.path.lower()
    name, suffix = path.rpartition("/")[2], suffix_of(path)
    folder = entry.item.path.rpartition("/")[0]
    if entry.is_folder:
        return entry.problem
    if any(part.endswith(UNFINISHED) for part in entry.item.name.lower().split("/")):
        return "is part of an unfinished download", "finish or remove it"
    if entry.problem and suffix:
        return entry.problem
    if not suffix and not _is_known(name):
        return (f"is of another kind ({Path(name).suffix or 'no suffix'})",)
    if not suffix:
        return "is of a kind that cannot be read", f"convert it to one of {', '.join(SUFFIXES)}"
    if name in HF_METADATA:
        return ("describes a dataset of Hugging Face",)
    if suffix == ".arrow" and folder in parts:
        if entry.item.path not in parts[folder]:
            return ("is not part of the dataset (state.json)",)
    elif fnmatch(name, HF_CACHE) and not entry.is_named:
        return ("is a cache of `datasets`",)
    if not entry.item.size_bytes:
        is_damaged = suffix.endswith((*COMPRESSIONS, *TABLES))
        return (
            "is empty (0 bytes), as no whole file of its kind is",
            "fetch it again",
        ) * is_damaged
    return _why_no_lines(entry.item) if suffix == ".json" else ()


def _is_known(name: str) -> bool:
    """Whether a file that is not read is likely to hold documents."""
    ends = ("", *COMPRESSIONS, *OTHER_COMPRESSIONS)
    if name.endswith(tuple(form + end for form in OTHER_FORMATS for end in ends)):
        return True
    return name.endswith(tuple(kind + end for kind in SUFFIXES for end in ends[1:]))


def _why_no_lines(item: InputFile) -> tuple[str, ...]:
    """Tell by its beginning why a .json file does not have one object a line."""
    with open_seekable(item) as file:
        head = file.read(HEAD_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()
    if head.startswith(b"["):
        return "is a JSON array", "write one object a line (`jq -c .[]`)"
    if head.partition(b"\n")[0].strip() == b"{":
        return ("is one JSON object over several lines",)
    return ()


def _saved_datasets(entries: list[_Entry]) -> tuple[dict[str, tuple[str, ...]], list[Skipped]]:
    """Read each `state.json` of `Dataset.save_to_disk`.

    Returns: The arrow files of the dataset, by folder; what is missing, or must not be read as it is.
    """
    there = {entry.item.path for entry in entries}
    parts: dict[str, tuple[str, ...]] = {}
    lost: list[Skipped] = []
    for entry in entries:
        folder, _, name = entry.item.path.rpartition("/")
        if name != "state.json" or entry.problem or entry.is_named:
            continue
        with open_seekable(entry.item) as file:
            content = file.read()
        try:
            state = orjson.loads(content)
            names = [one["filename"].rpartition("/")[2] for one in state["_data_files"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # of another program
        listed = parts[folder] = tuple(f"{folder}/{name}" for name in names)
        lost += [
            Skipped(path, "is missing (state.json lists it)", "copy the folder again")
            for path in listed
            if path not in there
        ]
        if state.get("_indices_data_files"):
            parts[folder] = ()
            remedy = "save it again after `flatten_indices()`"
            lost.append(Skipped(folder, "is a selection of the rows of its files", remedy))
    return parts, lost


def _list_local(root: Path) -> Iterator[_Entry]:
    if not root.exists():
        raise DataError(f"--input {root} does not exist; give existing files or folders")
    top, label = str(root), root.resolve().name
    if root.is_dir():
        for path, problem in _walk(top):
            name = path.removeprefix(top).lstrip("/")
            if problem:
                yield _Entry(InputFile(name, path, 0), path, is_folder=True, problem=problem)
            else:
                yield _local(path, name, label)
    else:
        _require_suffix(root)
        entry = _local(top, root.name, root.resolve().parent.name)
        yield dataclasses.replace(entry, is_named=True)


def _walk(top: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield files, and folders with the reason why what they hold is not among them.

    Each folder is visited once, linked ones after all others.
    """
    visited, folders, links = set[str](), [top], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        identity = os.path.realpath(folder)
        if identity in visited:
            yield folder, ("is read under another name",)
            continue
        visited.add(identity)
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            yield folder, (f"cannot be listed ({error.strerror})", "change its permissions")
            continue
        for path in (os.path.join(folder, name) for name in names):
            if not os.path.isdir(path):
                yield path, ()
            else:
                (links if os.path.islink(path) else folders).append(path)


@functools.lru_cache(1024)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _local(path: str, name: str, label: str) -> _Entry:
    is_link = os.path.islink(path)
    folder, _, base = path.rpartition("/")
    identity = (
        os.path.realpath(path) if is_link else os.path.join(_real_folder(folder or "."), base)
    )
    item, problem = InputFile(name, path, 0, "", label), tuple[str, ...]()
    try:
        state = os.stat(path)
        item = InputFile(name, path, state.st_size, str(state.st_mtime_ns), label)
        if not stat.S_ISREG(state.st_mode):
            problem = "is not a file", "write its content to a file"
        elif not os.access(path, os.R_OK):
            problem = "cannot be read (permission denied)", "change its permissions"
        name.encode()
    except OSError as error:
        what = "is a broken link" if is_link else "cannot be read"
        problem = f"{what} ({error.strerror})", "restore or remove it"
    except UnicodeEncodeError:
        problem = "has a name that is not UTF-8", "rename it"
    return _Entry(item, identity, is_link, problem=problem)


def _list_url(root: str) -> Iterator[_Entry]:
    system, top = file_system(root)
    top = top.rstrip("/")

    def look() -> tuple[bool, list[dict[str, Any]]]:
        system.invalidate_cache()  # or a file that changes during the run looks as it did at the start
        if not system.exists(top):
            raise DataError(f"--input {root} does not exist; give existing files or folders")
        if not system.isdir(top):
            return True, [system.info(top)]
        found = system.find(top, detail=True)
        return False, [found[path] for path in sorted(found)]

    is_named, details = attempt(f"--input {root}", look, AT_START)
    if is_named:
        _require_suffix(root)
    for detail in details:
        path, problem = detail["name"], tuple[str, ...]()
        # A store without a tag or a time still has the size: changes of content alone are not detected.
        version = detail.get("ETag") or detail.get("mtime") or detail.get("LastModified") or ""
        name = path.removeprefix(top).lstrip("/") or path.rpartition("/")[2]
        folder = top.rpartition("/")[2] if path != top else top.split("/")[-2]
        url = system.unstrip_protocol(path)
        is_folder = bool(detail.get("islink")) and system.isdir(path)
        if is_folder:
            problem = "is a link to a folder, not followed in a URL", "name that folder too"
        elif "::" in path:
            problem = "has `::` in its name, which joins URLs", "rename it"
        item = InputFile(name, url, int(detail["size"]), str(version), folder)
        yield _Entry(item, url, False, is_folder, is_named, problem)


def _require_suffix(root: Path | str) -> None:
    if not suffix_of(str(root)):
        raise DataError(f"--input {root} has an unsupported suffix; use {', '.join(SUFFIXES)}")


def _printable(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode()
