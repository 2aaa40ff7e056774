"""Single documents and training windows of a dataset as text, with their origin."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_long.dataset.indexed import IndexedDatasetReader
from megatron_long.dataset.manifest import (
    DOCUMENTS_FILE,
    TOKENIZER_FOLDER,
    TRAIN_PREFIX,
    documents_path,
    read_manifest,
)
from megatron_long.errors import ConfigError
from megatron_long.tokenizer.loading import load_tokenizer
from megatron_long.tokenizer.tokenizer_types import REFERENCE

SNIPPET_CHARS = 60


@dataclass(frozen=True)
class WindowPart:
    """The part of one document that is in a window."""

    offset: int
    """Where it begins in the window, in tokens."""
    num_tokens: int
    document: int
    first_token: int
    """Where it begins in the document, in tokens."""
    length_tokens: int
    """Length of the whole document."""
    tokens: NDArray


class DatasetBrowser:
    """A dataset folder opened for reading single documents and windows.

    Args:
        split: `train`, or the name of a source for its held-out documents.
    Raises: DataError: the folder is not a dataset or is damaged. ConfigError: no such split.
    """

    def __init__(self, dataset: Path, split: str = TRAIN_PREFIX) -> None:
        self.manifest = read_manifest(dataset)
        if split != TRAIN_PREFIX and split not in self.manifest.valid:
            choices = ", ".join((TRAIN_PREFIX, *self.manifest.valid))
            raise ConfigError(f"--split {split}: the dataset has {choices}")
        info = self.manifest.train if split == TRAIN_PREFIX else self.manifest.valid[split]
        self.split, self.reader = split, IndexedDatasetReader(dataset / info.prefix)
        self.tokenizer = load_tokenizer(dataset / TOKENIZER_FOLDER, REFERENCE)
        self._rows = self._open_rows(dataset, info.prefix)

    def _open_rows(self, dataset: Path, prefix: str) -> NDArray | None:
        path = dataset / DOCUMENTS_FILE
        if self.split != TRAIN_PREFIX:
            path = documents_path(dataset / prefix)
            if not path.is_file():  # datasets of the first release have none
                return None
        return np.load(path, "r")

    def source(self, document: int) -> str:
        """Return the source of a document."""
        if self.split != TRAIN_PREFIX or self._rows is None:
            return self.split
        return self.manifest.source_names[int(self._rows[document]["source"])]

    def place(self, document: int) -> str:
        """Return `file:line` of a document in the corpus."""
        if self._rows is None:
            return "held out"
        row = self._rows[document]
        return f"{self.manifest.inputs[int(row['file'])].name}:{int(row['line'])}"

    def describe_document(self, document: int) -> str:
        """Return a document's origin, in one line, and its text.

        Raises: ConfigError: there is no such document.
        """
        count = len(self.reader)
        if not 0 <= document < count:
            raise ConfigError(f"--document {document}: {self.split} has documents 0 to {count - 1}")
        tokens = self.reader.read(document)
        head = (
            f"document {document} of {self.split}: {self.source(document)}, {self.place(document)}, "
            f"{len(tokens):,} tokens"
        )
        return f"{head}\n{self.decode(tokens)}"

    def window_parts(self, window: int, seq_length: int) -> Iterator[WindowPart]:
        """Yield the documents in tokens [window * seq_length, (window + 1) * seq_length).

        Raises: ConfigError: there is no such window.
        """
        count = max(self.reader.num_tokens - 1, 0) // max(seq_length, 1)
        if seq_length < 1 or not 0 <= window < count:
            raise ConfigError(
                f"--window {window}: with --seq-length {seq_length} the dataset of "
                f"{self.reader.num_tokens:,} tokens has {count:,} windows, counted from 0"
            )
        start = window * seq_length
        ends = np.cumsum(self.reader.lengths, dtype=np.int64)
        first = int(np.searchsorted(ends, start, side="right"))
        bounds = [*self.reader.document_starts(start, seq_length).tolist(), seq_length]
        tokens = self.reader.read_span(start, seq_length)
        for document, (begin, end) in enumerate(itertools.pairwise(bounds), first):
            length = int(self.reader.lengths[document])
            inside = start + begin - (int(ends[document]) - length)
            yield WindowPart(begin, end - begin, document, inside, length, tokens[begin:end])

    def snippet(self, part: WindowPart) -> str:
        """Return the beginning of a part as one line of text."""
        text = self.decode(part.tokens[: 2 * SNIPPET_CHARS])
        line = " ".join(text.split())
        return line[:SNIPPET_CHARS] + ("…" if len(line) > SNIPPET_CHARS else "")

    def decode(self, tokens: NDArray) -> str:
        """Return the text of tokens, without the BOS and EOD around it."""
        marks = (self.manifest.tokenizer.bos_id, self.manifest.tokenizer.eod_id)
        ids = tokens.tolist()
        first = 1 if ids and ids[0] == marks[0] else 0
        last = len(ids) - 1 if ids and ids[-1] == marks[1] else len(ids)
        return self.tokenizer.decode(ids[first:last])
