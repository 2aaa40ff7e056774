"""One task of the first stage: one file of the corpus to tokens and metadata, whole or not at all.

The folder of a file holds `tokens.bin` (texts alone, without BOS and EOD), `rows.npy` (one row for each
document that may be used) and `info.json` (what was seen, also of documents that were not tokenized).
It is renamed into place at the end, so its presence says that the file is done.
"""

import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_long.corpus.documents import (
    BATCH_BYTES,
    BadDocuments,
    Document,
    FileState,
    RecordKeys,
    read_documents,
)
from megatron_long.corpus.inputs import InputFile, hash_input
from megatron_long.dataset.indexed import MAX_LENGTH
from megatron_long.errors import DataError
from megatron_long.files import atomic_path
from megatron_long.mixture.admission import Admission, Limits, measured_share
from megatron_long.mixture.keys import batch_keys, below, below_each
from megatron_long.mixture.rows import (
    INFO_FILE,
    ROW_DTYPE,
    ROWS_FILE,
    TOKENS_FILE,
    Stratum,
    StratumCounts,
    size_buckets,
)
from megatron_long.tokenizer.tokenizer_types import Tokenizer, Tokens

RUN_TOKENS = 4 << 20
"""Tokens gathered before they are sorted by key and written, so that later reading goes forward."""
WRITE_BYTES = 1 << 20
"""Buffer of what is written: most documents are a few kilobytes."""

Progress = Callable[["FileProgress"], object]


@dataclass(frozen=True)
class TokenizeOptions:
    """What is the same for every file."""

    seed: int
    keys: RecordKeys
    long_threshold_tokens: int
    admission: Admission
    dtype: np.dtype
    extra_tokens: int | None
    """A text of b bytes has at most b + this many tokens; None if no bound is known."""
    overhead: int
    """BOS and EOD of a document."""
    skip_bad: bool = False
    max_text_bytes: int | None = None
    """Stop after about this much text: for samples."""
    sources_allowed: frozenset[str] | None = None
    """Sources with a share; None allows any."""


@dataclass
class FileProgress:
    """What a task has done so far."""

    file: str
    read_bytes: int = 0
    text_bytes: int = 0
    tokens: int = 0
    """Tokens made."""
    tokens_by_source: dict[str, int] | None = None
    done: bool = False


class _Gathered:
    """What is known of one file while it is read."""

    def __init__(self) -> None:
        self.sources: dict[str, int] = {}
        self.strata: dict[Stratum, NDArray[np.float64]] = defaultdict(
            lambda: np.zeros(len(StratumCounts._fields))
        )
        """`StratumCounts` of each: exact below 2^53, as squares need more than 64 bits."""
        self.lengths: dict[tuple[int, int, int, int], int] = defaultdict(int)
        """Tokens by stratum and log2 of the length."""
        self.tokens_by_source: dict[str, int] = defaultdict(int)
        self.empty = 0
        self.num_rows = 0
        self.rows: list[NDArray] = []
        self.tokens: list[NDArray] = []
        self.pending_tokens = 0
        self.offset = 0


def tokenize_file(
    item: InputFile,
    index: int,
    tokenizer: Tokenizer,
    options: TokenizeOptions,
    folder: Path,
    on_progress: Progress = lambda progress: None,
) -> None:
    """Tokenize what may be used of one file into `folder`.

    Args:
        index: Number of the file among the inputs.
    Raises: DataError: the file or a document is bad, changed while it was read, or has an odd source.
    """
    with atomic_path(folder, directory=True) as temporary:
        with (
            open(temporary / TOKENS_FILE, "wb", WRITE_BYTES) as tokens,
            open(temporary / ROWS_FILE, "wb", WRITE_BYTES) as rows,
        ):
            info = _read_file(item, index, tokenizer, options, tokens, rows, on_progress)
        (temporary / INFO_FILE).write_bytes(orjson.dumps(info))
    on_progress(FileProgress(item.name, item.read_bytes, info["text_bytes"], done=True))


def measure_file(item: InputFile, tokenizer: Tokenizer, options: TokenizeOptions) -> dict[str, Any]:
    """Return what `tokenize_file` would write about a file, without keeping any tokens."""
    nowhere = io.BytesIO()
    return _read_file(item, 0, tokenizer, options, nowhere, nowhere, lambda progress: None)


def _read_file(
    item: InputFile,
    index: int,
    tokenizer: Tokenizer,
    options: TokenizeOptions,
    tokens: BinaryIO,
    rows: BinaryIO,
    on_progress: Progress,
) -> dict[str, Any]:
    got, bad, state = _Gathered(), BadDocuments(options.skip_bad), FileState()
    if options.max_text_bytes is not None:  # in small steps, to end close to it
        state.batch_bytes = min(BATCH_BYTES, max(options.max_text_bytes // 8, 1))
    progress, before = FileProgress(item.name), tokenizer.num_by_reference
    for documents in read_documents(item, options.keys, bad, state):
        progress.text_bytes += _add(got, documents, item, index, tokenizer, options)
        if got.pending_tokens >= RUN_TOKENS:
            _flush(got, tokens, rows)
        progress.read_bytes = state.position_bytes
        progress.tokens_by_source = dict(got.tokens_by_source)
        progress.tokens = sum(progress.tokens_by_source.values())
        on_progress(progress)
        limit = options.max_text_bytes
        if limit is not None and progress.text_bytes >= limit:
            break
    _flush(got, tokens, rows)
    if options.max_text_bytes is None and not state.xxh3_128:
        state.xxh3_128 = hash_input(item)
    info = _info(got, bad, item, state, progress)
    return info | {"documents_by_reference": tokenizer.num_by_reference - before}


def _add(
    got: _Gathered,
    documents: Sequence[Document],
    item: InputFile,
    index: int,
    tokenizer: Tokenizer,
    options: TokenizeOptions,
) -> int:
    """Take a batch in; give its bytes of text."""
    if not documents:
        return 0
    for document in documents:
        if document.source not in got.sources:
            _check_source(document, item.path, options.sources_allowed)
            got.sources[document.source] = len(got.sources)
    limits = [options.admission.limits(name) for name in got.sources]
    sources = np.array([got.sources[document.source] for document in documents])
    sizes = np.array([_size(document.text) for document in documents])
    lines = np.array([document.line for document in documents])
    keys = batch_keys(options.seed, item.name, lines.tolist())
    proven = np.zeros(len(sizes), np.bool_)
    if options.extra_tokens is not None:
        proven = sizes + options.extra_tokens + options.overhead < options.long_threshold_tokens
    wanted = _admitted(limits, sources, keys, ~proven) | _measured(limits, sources, keys, sizes)
    chosen = np.flatnonzero(wanted)
    ids, counts = tokenizer.encode_flat([documents[i].text for i in chosen.tolist()])
    _check_ids(ids, counts, tokenizer.vocab_size, item.path, lines[chosen])
    lengths = np.zeros(len(sizes), np.int64)
    lengths[chosen] = np.where(counts > 0, counts + options.overhead, 0)
    got.empty += int((counts == 0).sum())
    is_long = lengths >= options.long_threshold_tokens
    _count(got, sources, sizes, proven, wanted, lengths, is_long)
    usable = wanted & (lengths > 0) & _admitted(limits, sources, keys, is_long)
    rows = np.zeros(int(usable.sum()), ROW_DTYPE)
    rows["source"], rows["file"] = sources[usable], index
    rows["line"] = lines[usable]
    rows["length_tokens"] = lengths[usable]
    rows["drop_key"], rows["order_key"] = keys[usable].T
    usable_counts = counts[usable[chosen]]
    rows["offset"] = got.pending_tokens + np.cumsum(usable_counts) - usable_counts
    kept = ids if usable[chosen].all() else ids[np.repeat(usable[chosen], counts)]
    got.rows.append(rows)
    got.tokens.append(kept.astype(options.dtype))
    got.pending_tokens += len(kept)
    return int(sizes.sum())


def _admitted(
    limits: Sequence[Limits], sources: NDArray, keys: NDArray[np.uint64], is_long: NDArray
) -> NDArray[np.bool_]:
    """Mark documents that may be used, given which may be long."""
    wanted = np.zeros(len(sources), np.bool_)
    for source in np.unique(sources).tolist():
        mine, limit = sources == source, limits[source]
        drop, order = keys[mine].T
        trained = below(order, limit.order) & (is_long[mine] | below(drop, limit.keep_short))
        wanted[mine] = trained | below(order, limit.valid)
    return wanted


def _measured(
    limits: Sequence[Limits], sources: NDArray, keys: NDArray[np.uint64], sizes: NDArray
) -> NDArray[np.bool_]:
    """Mark documents that are tokenized to estimate the tokens of others."""
    measure = np.array([limit.measure for limit in limits])
    return below_each(keys[:, 1], measured_share(measure[sources], size_buckets(sizes)))


def _count(
    got: _Gathered,
    sources: NDArray,
    sizes: NDArray,
    proven: NDArray,
    wanted: NDArray,
    lengths: NDArray,
    is_long: NDArray,
) -> None:
    """Count by source, by whether the size proves a document short, and by its size."""
    buckets = size_buckets(sizes)
    strata = (sources.astype(np.int64) << 8) | (proven.astype(np.int64) << 7) | buckets
    found, place = np.unique(strata, return_inverse=True)
    done, made, in_long = (
        sizes * wanted.astype(np.float64),
        lengths.astype(np.float64),
        lengths * is_long,
    )
    columns = StratumCounts(
        documents=np.ones(len(sizes)),
        size_bytes=sizes,
        documents_tokenized=wanted,
        size_bytes_tokenized=done,
        long_tokens=in_long,
        tokens=made,
        bytes_squared=done**2,
        tokens_squared=made**2,
        tokens_times_bytes=made * done,
        long_tokens_squared=in_long * made,
        long_tokens_times_bytes=in_long * done,
    )
    sums = np.stack([np.bincount(place, column) for column in columns], axis=1)
    for stratum, row in zip(found.tolist(), sums, strict=True):
        got.strata[Stratum(stratum >> 8, stratum >> 7 & 1, stratum & 127)] += row
    length_buckets = size_buckets(lengths)
    cells = ((strata << 6) | length_buckets)[lengths > 0]
    found, place = np.unique(cells, return_inverse=True)
    tokens = np.bincount(place, lengths[lengths > 0]).astype(np.int64).tolist()
    for cell, count in zip(found.tolist(), tokens, strict=True):
        got.lengths[cell >> 14, cell >> 13 & 1, cell >> 6 & 127, cell & 63] += count
    by_source = np.bincount(sources, lengths, len(got.sources)).astype(np.int64).tolist()
    for name, count in zip(got.sources, by_source, strict=True):
        got.tokens_by_source[name] += count


def _flush(got: _Gathered, tokens: BinaryIO, rows: BinaryIO) -> None:
    """Write a run: rows by source and key, tokens in the same order."""
    if not got.rows:
        return
    run, ids = np.concatenate(got.rows), np.concatenate(got.tokens)
    order = np.lexsort((run["order_key"], run["source"]))
    starts = run["offset"].astype(np.int64)
    ends = np.append(starts[1:], len(ids))
    sizes = ends - starts
    for i in order.tolist():
        tokens.write(ids[starts[i] : ends[i]].data)
    run = run[order]
    run["offset"] = got.offset + np.cumsum(sizes[order]) - sizes[order]
    rows.write(run.tobytes())
    got.offset += len(ids)
    got.num_rows += len(run)
    got.rows, got.tokens, got.pending_tokens = [], [], 0


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _check_source(document: Document, path: str, allowed: frozenset[str] | None) -> None:
    if allowed is not None and document.source not in allowed:
        raise DataError(
            f"{path}:{document.line} is of source {document.source}, and --source-shares gives no "
            f"share to it (it names {', '.join(sorted(allowed))}); give a YAML file "
            "with a share for each source (0 leaves one out)"
        )


def _check_ids(ids: Tokens, counts: NDArray, vocab_size: int, path: str, lines: NDArray) -> None:
    # An added token beyond the vocabulary would turn into another one when stored in two bytes.
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise DataError(
            f"{path}: the tokenizer gives the id {int(ids.max())}, and its vocabulary has "
            f"{vocab_size} ids: its files do not belong together"
        )
    if len(counts) and counts.max() > MAX_LENGTH - 2:
        line = lines[int(counts.argmax())]
        raise DataError(
            f"{path}:{line} has {int(counts.max()):,} tokens; the format ends at {MAX_LENGTH:,}"
        )


def _info(
    got: _Gathered, bad: BadDocuments, item: InputFile, state: FileState, progress: FileProgress
) -> dict[str, Any]:
    return {
        "name": item.name,
        "size_bytes": item.size_bytes,
        "piece_bytes": item.read_bytes,
        "xxh3_128": state.xxh3_128,
        "read_bytes": state.position_bytes,
        "text_bytes": progress.text_bytes,
        "num_rows": got.num_rows,
        "sources": list(got.sources),
        "documents_empty": got.empty,
        "documents_bad": bad.count,
        "bad": bad.listed,
        "strata": [[*key, *row.tolist()] for key, row in sorted(got.strata.items())],
        "lengths": [[*key, count] for key, count in sorted(got.lengths.items())],
    }
