"""Size and hash of files, as recorded in manifests and checkpoints."""

from dataclasses import dataclass
from pathlib import Path

import xxhash


@dataclass(frozen=True)
class FileInfo:
    """Size and hash of one file."""

    size_bytes: int
    xxh3_128: str


def hash_file(path: Path) -> FileInfo:
    """Return size and xxh3_128 of a file."""
    digest, size_bytes = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size_bytes += len(block)
    return FileInfo(size_bytes, digest.hexdigest())
