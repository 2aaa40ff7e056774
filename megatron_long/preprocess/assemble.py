"""From a plan and its written parts to the dataset folder."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_long.dataset.indexed import IndexedDatasetWriter, bin_path, idx_path, write_index
from megatron_long.dataset.manifest import (
    DOCUMENTS_FILE,
    TRAIN_PREFIX,
    SplitInfo,
    documents_path,
)
from megatron_long.hashing import FileInfo, hash_file
from megatron_long.mixture.external_sort import iterate_rows
from megatron_long.mixture.rows import ROW_DTYPE
from megatron_long.preprocess.stages import WriteJob, gather_tokens

DOCUMENTS_DTYPE = np.dtype(
    [("source", "<u2"), ("file", "<u4"), ("line", "<u8"), ("length_tokens", "<u8")]
)
"""One row of `documents.npy`."""


def write_train(
    folder: Path, parts: Sequence[Path], dtype: np.dtype, order: NDArray, numbers: NDArray
) -> SplitInfo:
    """Put the parts together, and write the index and `documents.npy`.

    Args:
        numbers: The number of the corpus file that each item of the first stage is, or is a piece of.
    """
    prefix = folder / TRAIN_PREFIX
    files = {bin_path(prefix).name: _join_parts(parts, bin_path(prefix))}
    # The order lives in a memory map: only a chunk of it is in memory at a time.
    write_index(
        idx_path(prefix),
        dtype,
        len(order),
        lambda: (rows["length_tokens"] for rows in iterate_rows(order)),
    )
    files[idx_path(prefix).name] = hash_file(idx_path(prefix))
    num_tokens = _write_documents(folder / DOCUMENTS_FILE, order, numbers)
    files[DOCUMENTS_FILE] = hash_file(folder / DOCUMENTS_FILE)
    return SplitInfo(TRAIN_PREFIX, len(order), num_tokens, files)


def _write_documents(path: Path, order: NDArray, numbers: NDArray) -> int:
    """Write a `documents.npy`; give the number of its tokens."""
    shape, descr = (len(order),), np.lib.format.dtype_to_descr(DOCUMENTS_DTYPE)
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    num_tokens = 0
    with open(path, "wb") as file:  # not a map, in which a full disk would end the process
        np.lib.format.write_array_header_1_0(file, header)
        for rows in iterate_rows(order):
            documents = np.empty(len(rows), DOCUMENTS_DTYPE)
            for name in ("source", "line", "length_tokens"):
                documents[name] = rows[name]
            documents["file"] = numbers[rows["file"]]
            file.write(documents.tobytes())
            num_tokens += int(rows["length_tokens"].astype(np.int64).sum())
    return num_tokens


def write_valid(
    folder: Path, job: WriteJob, valid: Mapping[str, NDArray], numbers: NDArray
) -> dict[str, SplitInfo]:
    """Write the held-out documents of each source, whole, by file and line; `numbers` as above."""
    (folder / "valid").mkdir(exist_ok=True)
    splits = {}
    for name, rows in valid.items():
        # Shares of a file are by turns, not one after the other.
        rows = rows[np.lexsort((rows["line"], numbers[rows["file"]]))]
        prefix = f"valid/{quote(name, safe=' ')}"
        with IndexedDatasetWriter(folder / prefix, job.dtype) as writer:
            for row in rows:
                writer.add_document(gather_tokens(np.array([row], ROW_DTYPE), job))
            writer.finalize()
        num_tokens = _write_documents(documents_path(folder / prefix), rows, numbers)
        paths = [kind(folder / prefix) for kind in (bin_path, idx_path, documents_path)]
        files = {path.relative_to(folder).as_posix(): hash_file(path) for path in paths}
        splits[name] = SplitInfo(prefix, len(rows), num_tokens, files)
    return splits


def _join_parts(parts: Sequence[Path], path: Path) -> FileInfo:
    digest, size_bytes = xxhash.xxh3_128(), 0
    with open(path, "wb", buffering=0) as target:
        for block in _blocks(parts):
            digest.update(block)
            size_bytes += len(block)
            while len(block):
                block = block[target.write(block) :]
    return FileInfo(size_bytes, digest.hexdigest())


def _blocks(paths: Sequence[Path]) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(1 << 20))  # small enough to stay in the processor's cache
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield buffer[:count]
