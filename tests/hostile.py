"""Pickles that leave a file where they are read without care, in every form that a reader may meet."""

import contextlib
import io
import os
import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch


class Harmful:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def raw(marker: Path) -> bytes:
    """A plain pickle, as `.metadata` is one."""
    return pickle.dumps(Harmful(marker))


def saved(marker: Path) -> bytes:
    """What `torch.save` writes."""
    stream = io.BytesIO()
    torch.save([{"args": Harmful(marker)}], stream)
    return stream.getvalue()


def saved_before_torch_1_6(marker: Path) -> bytes:
    """What `torch.save` wrote before it wrote zip archives: several pickles one after another."""
    stream = io.BytesIO()
    torch.save({"args": Harmful(marker)}, stream, _use_new_zipfile_serialization=False)
    return raw(marker) + stream.getvalue()


def array(marker: Path) -> bytes:
    """A numpy array of objects."""
    stream = io.BytesIO()
    np.save(stream, np.array([Harmful(marker)], dtype=object), allow_pickle=True)
    return stream.getvalue()


def archive(marker: Path) -> bytes:
    """An `.npz` with such an array, under the names of torch's archives too."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name in ("a.npy", "archive/data.pkl", "data.pkl"):
            file.writestr(name, array(marker) if name == "a.npy" else raw(marker))
    return stream.getvalue()


FORMS: tuple[Callable[[Path], bytes], ...] = (
    raw,
    saved,
    saved_before_torch_1_6,
    array,
    archive,
)


def was_run(content: bytes, marker: Path) -> bool:
    """Whether reading without care runs it, so that a test with it could fail."""
    marker.unlink(missing_ok=True)
    readers: tuple[Callable[[io.BytesIO], object], ...] = (
        pickle.load,
        lambda stream: torch.load(stream, weights_only=False),
        lambda stream: np.load(stream, allow_pickle=True),
        lambda stream: np.load(stream, allow_pickle=True)["a"],
    )
    for read in readers:
        try:
            read(io.BytesIO(content))
        except Exception:  # not its kind of file
            continue
    found = marker.exists()
    marker.unlink(missing_ok=True)
    return found


def plant_everywhere(folder: Path, readers: Sequence[Callable[[], object]]) -> int:
    """Put every form instead of every file of a folder, and read; nothing may be run.

    Args:
        readers: Each opens the folder; what it raises does not matter here.
    Returns: How often something was read.
    """
    marker, count = folder.parent / "marker", 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for form in FORMS:
            path.write_bytes(form(marker))
            for read in readers:
                with contextlib.suppress(Exception):
                    read()
                assert not marker.exists(), (path, form, read)
                count += 1
        path.write_bytes(whole)
    return count


def plant_object(iteration: Path, key: str, content: bytes) -> None:
    """Put this instead of an object or tensor of a `torch_dist` checkpoint; its index says so."""
    index = pickle.loads((iteration / ".metadata").read_bytes())
    (item,) = [item for item in index.storage_data if item.fqn == key][:1]
    place = index.storage_data[item]
    path = iteration / place.relative_path
    place.offset, place.length = path.stat().st_size, len(content)
    with path.open("ab") as file:
        file.write(content)
    (iteration / ".metadata").write_bytes(pickle.dumps(index))
