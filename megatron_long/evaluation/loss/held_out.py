"""The held-out documents of a dataset folder, as rows to score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_long.errors import DataError
from megatron_long.evaluation.batches import Row

if TYPE_CHECKING:
    from megatron_long.dataset.indexed import IndexedDatasetReader
    from megatron_long.dataset.manifest import Manifest


class DocumentReader(Protocol):
    """What is needed of an indexed dataset: see `megatron_long.dataset.indexed`."""

    @property
    def lengths(self) -> np.ndarray:
        """Length of each document, tokens."""
        ...

    def read(self, index: int, /) -> np.ndarray:
        """Give the tokens of one document."""
        ...


@dataclass(frozen=True)
class HeldOutDocument:
    """One document of `valid/<source>`, read when needed."""

    source: str
    reader: DocumentReader
    index: int

    def num_tokens(self, context_length: int) -> int:
        """Give the number of tokens of its row."""
        return min(int(self.reader.lengths[self.index]) - 1, context_length)

    def row(self, context_length: int) -> Row:
        """Give its first `context_length` tokens, each labelled with the next one."""
        tokens = np.asarray(self.reader.read(self.index)[: context_length + 1], dtype=np.int64)
        return Row(tokens[:-1], tokens[1:])


def open_held_out(dataset: Path, manifest: Manifest) -> dict[str, IndexedDatasetReader]:
    """Open the held-out documents of every source, in the manifest's order of sources.

    Raises: DataError: there are none, or a file is damaged.
    """
    from megatron_long.dataset.indexed import IndexedDatasetReader

    names = [name for name in manifest.source_names if name in manifest.valid]
    if not names:
        raise DataError(
            f"--dataset {dataset} has no held-out documents; make it again with "
            "tools/preprocess_mix.py and let it hold some out"
        )
    return {name: IndexedDatasetReader(dataset / manifest.valid[name].prefix) for name in names}


def select_documents(
    readers: Mapping[str, DocumentReader],
    *,
    min_document_tokens: int = 2,
    max_documents_per_source: int | None = None,
) -> list[HeldOutDocument]:
    """Give the held-out documents to score, in file order within each source.

    Args:
        min_document_tokens: Shorter documents are left out. Needed for a curve of the same
            documents at every position: without it only the long ones reach its end.
        max_documents_per_source: The first so many of each source; None takes all.
    Raises: DataError: no document is long enough.
    """
    documents = []
    for source, reader in readers.items():
        long_enough = np.flatnonzero(reader.lengths >= max(2, min_document_tokens))
        for index in long_enough[:max_documents_per_source]:
            documents.append(HeldOutDocument(source, reader, int(index)))
    if not documents:
        longest = max(int(max(reader.lengths, default=0)) for reader in readers.values())
        raise DataError(
            f"--min-document-tokens {min_document_tokens}: no held-out document is that long, the "
            f"longest has {longest} tokens; use a smaller number or hold out longer documents"
        )
    return documents
