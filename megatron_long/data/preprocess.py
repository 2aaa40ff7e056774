"""From a corpus to a dataset folder: read, tokenize, plan the mixture, write.

Tokens of the whole corpus go to one temporary file on disk; memory holds a row of 38 bytes per
document and a few batches. The result is the same bytes whatever the number of workers, since only
keys made of (seed, file name, line) decide what is taken and in which order.
"""

import dataclasses
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from urllib.parse import quote

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_long.data.documents import (
    InputFile,
    LineBatch,
    Progress,
    RecordKeys,
    find_inputs,
    no_progress,
    parse_documents,
    read_batches,
)
from megatron_long.data.indexed import IndexedDatasetWriter, bin_path, idx_path, token_dtype
from megatron_long.data.manifest import (
    DOCUMENTS_FILE,
    TOKENIZER_FOLDER,
    TRAIN_PREFIX,
    InputInfo,
    Manifest,
    SourceInfo,
    SplitInfo,
    hash_file,
    tokenizer_info,
    write_manifest,
)
from megatron_long.data.mixture import CORPUS_DTYPE, Mixture, MixturePlan, plan_mixture
from megatron_long.data.tokenizers import Tokenizer, Tokens, copy_tokenizer, load_tokenizer
from megatron_long.errors import ConfigError, DataError
from megatron_long.files import atomic_path

DOCUMENTS_DTYPE = np.dtype(CORPUS_DTYPE.descr[:4])
"""One row of `documents.npy`: source, file, line, length_tokens of a training document."""
TOKENS_FILE = "corpus_tokens.tmp"
IN_FLIGHT_PER_WORKER = 3


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What to read and how to mix it."""

    inputs: Sequence[Path]
    tokenizer: Path
    mixture: Mixture
    seed: int = 0
    keys: RecordKeys = field(default_factory=RecordKeys)
    workers: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"--workers {self.workers} is too small; at least 1")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"--seed {self.seed} is not within 0 and 2^64 - 1")


@dataclass(frozen=True)
class Corpus:
    """What is known of a tokenized corpus without its tokens."""

    files: list[InputFile]
    sources: list[str]
    documents: NDArray
    """CORPUS_DTYPE, in reading order; the temporary token file has the same order."""


@dataclass(frozen=True)
class TokenizedBatch:
    """The documents of a batch: rows whose `source` counts in `sources`, and all their tokens."""

    sources: list[str]
    rows: NDArray
    tokens: NDArray


def plan_dataset(
    config: PreprocessConfig, on_progress: Progress = no_progress
) -> dict[str, SourceInfo]:
    """Tell what `preprocess` would make of each source, writing nothing."""
    files, tokenizer = find_inputs(config.inputs), load_tokenizer(config.tokenizer)
    corpus = _tokenize_corpus(config, files, tokenizer, None, on_progress)
    return plan_mixture(corpus.documents, corpus.sources, config.mixture).sources


def preprocess(
    config: PreprocessConfig, output: Path, on_progress: Progress = no_progress
) -> Manifest:
    """Make a dataset folder; it appears whole or not at all.

    Args:
        on_progress: Called with the bytes of input read since the last call.
    """
    files, tokenizer = find_inputs(config.inputs), load_tokenizer(config.tokenizer)
    with atomic_path(output, directory=True) as folder:
        store_path = folder / TOKENS_FILE
        with open(store_path, "wb") as store:
            corpus = _tokenize_corpus(config, files, tokenizer, store, on_progress)
        plan = plan_mixture(corpus.documents, corpus.sources, config.mixture)
        manifest = _write_dataset(folder, store_path, config, tokenizer, corpus, plan)
        store_path.unlink()
        copy_tokenizer(config.tokenizer, folder / TOKENIZER_FOLDER)
        write_manifest(folder, manifest)
    return manifest


def document_keys(seed: int, file_name: str, line: int) -> tuple[int, int]:
    """Give the two keys of a document, each uniform in [0, 2^64).

    >>> document_keys(0, "a.jsonl", 1) == document_keys(0, "a.jsonl", 2)
    False
    """
    key = xxhash.xxh3_128_intdigest(f"{file_name}\0{line}".encode(), seed)
    return key >> 64, key & (2**64 - 1)


def tokenize_batch(
    batch: LineBatch, tokenizer: Tokenizer, keys: RecordKeys, seed: int
) -> TokenizedBatch:
    """Parse and tokenize the lines of a batch; documents without any token are left out."""
    documents = parse_documents(batch, keys)
    encoded = tokenizer.encode_batch([document.text for document in documents])
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    sources: dict[str, int] = {}
    rows: list[tuple[int, ...]] = []
    parts: list[Tokens] = []
    for (line, _), document, ids in zip(batch.lines, documents, encoded, strict=True):
        if len(ids):
            source = sources.setdefault(document.source, len(sources))
            length = len(bos) + len(ids) + 1
            rows.append((source, batch.file, line, length, *document_keys(seed, batch.name, line)))
            parts += [np.array(bos, np.int32), ids, np.array([tokenizer.eod_id], np.int32)]
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    dtype = token_dtype(tokenizer.vocab_size)
    return TokenizedBatch(list(sources), np.array(rows, CORPUS_DTYPE), tokens.astype(dtype))


def _tokenize_corpus(
    config: PreprocessConfig,
    files: list[InputFile],
    tokenizer: Tokenizer,
    store: IO[bytes] | None,
    on_progress: Progress,
) -> Corpus:
    """Tokenize everything; tokens go to `store` in reading order."""
    found: dict[str, int] = {}
    parts = [np.zeros(0, CORPUS_DTYPE)]
    for result in _tokenized(config, tokenizer, read_batches(files, on_progress=on_progress)):
        index = np.array([found.setdefault(name, len(found)) for name in result.sources], "<u2")
        result.rows["source"] = index[result.rows["source"]]
        parts.append(result.rows)
        if store is not None:
            store.write(result.tokens.data)
    documents = np.concatenate(parts)
    if not len(documents):
        raise DataError(f"--input holds no text ({len(files)} files read); there is nothing to mix")
    sources = sorted(found)
    rank = np.zeros(len(found), "<u2")
    rank[[found[name] for name in sources]] = np.arange(len(sources))
    documents["source"] = rank[documents["source"]]
    return Corpus(files, sources, documents)


def _tokenized(
    config: PreprocessConfig, tokenizer: Tokenizer, batches: Iterable[LineBatch]
) -> Iterator[TokenizedBatch]:
    """Tokenize batches in order, a bounded number of them at a time."""
    if config.workers == 1:
        for batch in batches:
            yield tokenize_batch(batch, tokenizer, config.keys, config.seed)
        return
    pool = ProcessPoolExecutor(
        config.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(config.tokenizer, config.keys, config.seed),
    )
    pending: deque[Future[TokenizedBatch]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_work, batch))
            if len(pending) >= IN_FLIGHT_PER_WORKER * config.workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise ConfigError(
            f"a worker of --workers {config.workers} died, most likely killed for want of memory; use "
            "fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: Callable[[LineBatch], TokenizedBatch]


def _start_worker(tokenizer_path: Path, keys: RecordKeys, seed: int) -> None:
    global _worker
    tokenizer = load_tokenizer(tokenizer_path)
    _worker = lambda batch: tokenize_batch(batch, tokenizer, keys, seed)  # noqa: E731


def _work(batch: LineBatch) -> TokenizedBatch:
    return _worker(batch)


def _write_dataset(
    folder: Path,
    store_path: Path,
    config: PreprocessConfig,
    tokenizer: Tokenizer,
    corpus: Corpus,
    plan: MixturePlan,
) -> Manifest:
    dtype = token_dtype(tokenizer.vocab_size)
    store = np.memmap(store_path, dtype, "r")
    lengths = corpus.documents["length_tokens"].astype(np.int64)
    starts = np.cumsum(lengths) - lengths

    def write_split(prefix: str, rows: NDArray, counts: NDArray) -> SplitInfo:
        with IndexedDatasetWriter(folder / prefix, dtype) as writer:
            for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
                tokens = store[starts[row] : starts[row] + count]
                if count < lengths[row]:
                    tokens = np.append(tokens[:-1], dtype.type(tokenizer.eod_id))
                writer.add_document(tokens)
            writer.finalize()
        return _split_info(folder, prefix, len(rows), int(counts.sum()))

    valid = {
        name: write_split(f"valid/{quote(name, safe=' ')}", rows, lengths[rows])
        for name, rows in plan.valid.items()
    }
    train = write_split(TRAIN_PREFIX, plan.rows["document"], plan.rows["length_tokens"])
    documents = corpus.documents[plan.rows["document"]][list(DOCUMENTS_DTYPE.names or ())]
    documents["length_tokens"] = plan.rows["length_tokens"]
    np.save(folder / DOCUMENTS_FILE, documents.astype(DOCUMENTS_DTYPE))
    train.files[DOCUMENTS_FILE] = hash_file(folder / DOCUMENTS_FILE)
    per_file = np.bincount(corpus.documents["file"], minlength=len(corpus.files)).tolist()
    return Manifest(
        seed=config.seed,
        mixture=dataclasses.asdict(config.mixture),
        tokenizer=tokenizer_info(tokenizer),
        dtype=dtype.name,
        train=train,
        valid=valid,
        sources=plan.sources,
        inputs=[
            InputInfo(file.name, file.size_bytes, count)
            for file, count in zip(corpus.files, per_file, strict=True)
        ],
    )


def _split_info(folder: Path, prefix: str, num_documents: int, num_tokens: int) -> SplitInfo:
    paths = [bin_path(folder / prefix), idx_path(folder / prefix)]
    files = {path.relative_to(folder).as_posix(): hash_file(path) for path in paths}
    return SplitInfo(prefix, num_documents, num_tokens, files)
