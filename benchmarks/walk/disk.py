"""The speed of this machine's disk and processor: streaming, hashing, reading of N GB, several files at once.

    python -m benchmarks.walk.disk --folder DIR --gb 16 --streams 4

Prints one JSON object: GB/s of writing with an fsync at the end (as `dd conv=fsync` does), of hashing
(xxh3-128) the files just written, of reading them (pages still cached), and of reading them from the disk.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from megatron_long.cli import run_tool, tool_parser

BLOCK = 16 * 2**20
READERS = 8
"""Files that a process reads concurrently, as `checkpoint.hashes` does."""


def write_stream(path: Path, size_bytes: int) -> None:
    """Write incompressible blocks to a file, and sync it to disk."""
    block = os.urandom(BLOCK)
    with path.open("wb", buffering=0) as file:
        left = size_bytes
        while left > 0:
            left -= file.write(block[: min(BLOCK, left)])
        os.fsync(file.fileno())


def hash_stream(path: Path) -> str:
    """Hash a file as checkpoints are hashed."""
    from megatron_long.hashing import hash_file

    return hash_file(path).xxh3_128


def read_stream(path: Path) -> None:
    """Read a file to its end."""
    buffer = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def drop_cache(path: Path) -> None:
    """Drop the file's pages from the cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _each(work: Callable[[Path], object], paths: list[Path]) -> None:
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(work, paths))


def measure(folder: Path, size_bytes: int, streams: int) -> dict[str, float]:
    """GB/s of every kind, over all streams together."""
    num_files = streams * 2
    shares = [
        [folder / f"{i}.bin" for i in range(start, num_files, streams)] for start in range(streams)
    ]
    each = size_bytes // num_files
    rates: dict[str, float] = {}
    with ProcessPoolExecutor(streams) as pool:
        list(pool.map(len, shares))  # the processes exist before the clock starts

        def time_it(name: str, work: Callable[[Path], object]) -> None:
            start = time.monotonic()
            list(pool.map(partial(_each, work), shares))
            rates[name] = each * num_files / (time.monotonic() - start) / 1e9

        time_it("write", partial(write_stream, size_bytes=each))
        time_it("hash", hash_stream)
        time_it("read_cached", read_stream)
        for share in shares:
            for path in share:
                drop_cache(path)
        time_it("read_disk", read_stream)
    return rates


def main() -> None:
    """Measure in a folder that is removed at the end."""
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add(
        "--folder",
        type=Path,
        required=True,
        help="folder on the disk to measure; created, and removed",
    )
    add("--gb", type=float, default=16.0, help="10^9 bytes in total (16)")
    add("--streams", type=int, default=4, help="processes at once, as ranks of a node (4)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    try:
        print(json.dumps(measure(args.folder, int(args.gb * 1e9), args.streams)))
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(run_tool(main))
