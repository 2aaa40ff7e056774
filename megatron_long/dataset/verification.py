"""Checks a dataset against its manifest: hashes, index, lengths, tokens."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_long.dataset.indexed import HEADER, IndexedDatasetReader, idx_path
from megatron_long.dataset.manifest import (
    DOCUMENTS_FILE,
    TOKENIZER_FOLDER,
    Manifest,
    SplitInfo,
    documents_path,
    read_manifest,
    verify_files,
)
from megatron_long.errors import DataError
from megatron_long.tokenizer.loading import load_tokenizer
from megatron_long.tokenizer.tokenizer_types import REFERENCE

CHUNK_TOKENS = 1 << 24
REMEDY = "copy or make the dataset again"


def verify_dataset(dataset: Path) -> Iterator[str]:
    """Check everything that can be checked without the corpus; yield a sentence for each check.

    Raises: DataError: the first thing that is wrong, with its file.
    """
    manifest = read_manifest(dataset)
    verify_files(dataset, manifest)
    yield "every file has the hash of the manifest"
    splits = {"train": manifest.train, **manifest.valid}
    for split in splits.values():
        _verify_split(dataset, split, manifest)
    yield f"every index matches its tokens ({len(splits)} splits)"
    yield "every document ends with EOD, and no token is outside the vocabulary"
    _verify_documents(dataset, manifest)
    for split in manifest.valid.values():
        path = documents_path(dataset / split.prefix)
        if path.is_file():  # datasets of the first release have none
            _verify_rows(path, dataset / split.prefix, manifest)
    yield "documents.npy matches the index, the inputs and the tokens of each source"
    found = load_tokenizer(dataset / TOKENIZER_FOLDER, REFERENCE).vocabulary_sha256
    if found != manifest.tokenizer.vocabulary_sha256:
        raise DataError(f"{dataset / TOKENIZER_FOLDER} is not the vocabulary of the manifest")
    yield "tokenizer/ is the vocabulary of the manifest"


def _verify_split(dataset: Path, split: SplitInfo, manifest: Manifest) -> None:
    prefix = dataset / split.prefix
    reader = IndexedDatasetReader(prefix)
    if reader.dtype != np.dtype(manifest.dtype):
        raise _wrong(idx_path(prefix), "token type", reader.dtype.name, manifest.dtype)
    if len(reader) != split.num_documents:
        raise _wrong(idx_path(prefix), "number of documents", len(reader), split.num_documents)
    if reader.num_tokens != split.num_tokens:
        raise _wrong(idx_path(prefix), "number of tokens", reader.num_tokens, split.num_tokens)
    lengths, pointers, indices = _read_index(idx_path(prefix), len(reader))
    ends = np.cumsum(lengths, dtype=np.int64)
    if not np.array_equal(pointers, (ends - lengths) * reader.dtype.itemsize):
        raise DataError(
            f"{idx_path(prefix)}: its offsets are not the sums of its lengths; {REMEDY}"
        )
    if not np.array_equal(indices, np.arange(len(reader) + 1)):
        raise DataError(f"{idx_path(prefix)}: a document is not one sequence; {REMEDY}")
    _verify_tokens(prefix, reader, ends, manifest)


def _verify_tokens(
    prefix: Path, reader: IndexedDatasetReader, ends: NDArray[np.int64], manifest: Manifest
) -> None:
    """Read all tokens once: the EODs are exactly the last tokens of the documents."""
    eod, vocab_size, seen = manifest.tokenizer.eod_id, manifest.tokenizer.vocab_size, 0
    for start in range(0, reader.num_tokens, CHUNK_TOKENS):
        tokens = reader.read_span(start, CHUNK_TOKENS)
        if int(tokens.max()) >= vocab_size or int(tokens.min()) < 0:
            at = start + int(np.argmax((tokens >= vocab_size) | (tokens < 0)))
            raise _wrong(prefix, f"token at {at:,}", int(tokens[at - start]), f"below {vocab_size}")
        found = np.flatnonzero(tokens == eod) + start + 1
        expected = ends[seen : seen + len(found)]
        if not np.array_equal(found, expected):
            pairs = zip(found.tolist(), expected.tolist(), strict=False)
            at = next((a for a, b in pairs if a != b), int(found[-1]))
            raise DataError(f"{prefix}: token {at - 1:,} is an EOD inside a document; {REMEDY}")
        seen += len(found)
    if seen != len(ends):
        raise _wrong(prefix, "number of EOD tokens", seen, len(ends))


def _verify_documents(dataset: Path, manifest: Manifest) -> None:
    path = dataset / DOCUMENTS_FILE
    rows = _verify_rows(path, dataset / manifest.train.prefix, manifest)
    sums = np.bincount(rows["source"], rows["length_tokens"], len(manifest.sources)).tolist()
    kept = [manifest.sources[name].tokens_kept for name in manifest.source_names]
    if sums != kept:
        raise _wrong(path, "tokens of each source", [int(count) for count in sums], kept)


def _verify_rows(path: Path, prefix: Path, manifest: Manifest) -> NDArray:
    rows, reader = np.load(path, "r"), IndexedDatasetReader(prefix)
    if not np.array_equal(rows["length_tokens"], reader.lengths):
        raise DataError(f"{path}: its lengths are not those of {idx_path(reader.prefix)}; {REMEDY}")
    if len(rows) and int(rows["file"].max()) >= len(manifest.inputs):
        raise _wrong(path, "file number", int(rows["file"].max()), f"below {len(manifest.inputs)}")
    return rows


def _read_index(path: Path, count: int) -> tuple[NDArray, NDArray, NDArray]:
    with open(path, "rb") as file:
        file.seek(HEADER.size)
        kinds = (("<i4", count), ("<i8", count), ("<i8", count + 1))
        lengths, pointers, indices = (np.fromfile(file, kind, number) for kind, number in kinds)
        if file.read(1):
            raise DataError(f"{path} is longer than its header says; {REMEDY}")
    return lengths, pointers, indices


def _wrong(path: Path, what: str, found: object, expected: object) -> DataError:
    return DataError(f"{path}: {what} is {found}, the manifest says {expected}; {REMEDY}")
