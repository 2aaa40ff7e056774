"""Loss by source and by position within the document, over held-out documents.

A model that uses long context has a lower loss far into a document than near its beginning. So
every held-out document gives its first `context_length` tokens, from its own first token on, and
the losses are summed by position, source by source. Position i is that of the input token: its
loss is that of predicting token i + 1 from i + 1 tokens of context. Intervals of positions are
half-open.

Sums are kept in cells whose edges include all bucket edges, so one accumulator serves the table
(Fu et al. 2024, arXiv 2402.10171, table 5) and the curve, and ranks are merged by adding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from megatron_long.cli import length_tokens
from megatron_long.errors import ConfigError, DataError
from megatron_long.evaluation.batches import score_rows
from megatron_long.evaluation.loss.held_out import HeldOutDocument
from megatron_long.model.labels import UNSCORED

if TYPE_CHECKING:
    from megatron_long.evaluation.batches import TokenScorer

CELLS_PER_OCTAVE = 4
"""Resolution of the curve: cells grow by a factor of 2^(1/4), but not below one token."""

FIRST_BUCKET_TOKENS = 4096
"""End of the first default bucket of a long context, as in the paper's table 5."""

Bucket = tuple[int, int]
"""Positions from the first (included) to the second (excluded), in tokens."""


@dataclass
class PositionLoss:
    """Sums of losses and counts of tokens by source and cell of positions."""

    edges: tuple[int, ...]
    """Cell i holds positions edges[i] to edges[i + 1]; the first edge is 0."""
    loss_sums: dict[str, np.ndarray] = field(default_factory=dict)
    """Sum of losses by source [cells], float64, nats."""
    token_counts: dict[str, np.ndarray] = field(default_factory=dict)
    """Number of tokens by source [cells], float64."""
    num_documents: dict[str, int] = field(default_factory=dict)

    def add(self, source: str, losses: np.ndarray, labels: np.ndarray) -> None:
        """Add one document.

        Args:
            losses: Loss at each position [n], n up to the last edge, nats.
            labels: Labels [n]; positions that are `UNSCORED` do not count.

        >>> loss = PositionLoss(edges=(0, 2, 4))
        >>> loss.add("Book", np.array([4.0, 2.0, 1.0]), np.array([7, 8, 9]))
        >>> loss.mean(0, 2), loss.mean(2, 4), loss.mean(0, 4, "Book")
        (3.0, 1.0, 2.3333333333333335)
        """
        self._add_sums(source, *self._sum_by_cell(losses, labels), 1)

    def merge(self, other: PositionLoss) -> None:
        """Add what another rank has summed."""
        assert self.edges == other.edges, "different cells cannot be merged"
        for source, sums in other.loss_sums.items():
            self._add_sums(source, sums, other.token_counts[source], other.num_documents[source])

    def num_tokens(self, start: int, stop: int, source: str | None = None) -> int:
        """Give the number of tokens at these positions, of one source or of all."""
        return int(self._total(self.token_counts, start, stop, source))

    def mean(self, start: int, stop: int, source: str | None = None) -> float:
        """Give the mean loss per token at these positions, nats; NaN where there is no token.

        Args:
            start, stop: Positions, both among the edges.
            source: One source, or None for all, each weighted by its tokens.
        """
        num_tokens = self._total(self.token_counts, start, stop, source)
        total = self._total(self.loss_sums, start, stop, source)
        return total / num_tokens if num_tokens else float("nan")

    def over(self, edges: Sequence[int]) -> PositionLoss:
        """Give the same sums in larger cells.

        Args:
            edges: Some of the edges, increasing.

        >>> loss = PositionLoss(edges=(0, 2, 4))
        >>> loss.add("Book", np.array([4.0, 2.0, 1.0]), np.array([7, 8, 9]))
        >>> loss.over((0, 4)).token_counts
        {'Book': array([3.])}
        """
        places = [self.edges.index(edge) for edge in edges]
        cells, first = slice(0, places[-1]), places[:-1]
        larger = PositionLoss(tuple(edges), num_documents=dict(self.num_documents))
        for source, sums in self.loss_sums.items():
            counts = self.token_counts[source]
            larger.loss_sums[source] = np.add.reduceat(sums[cells], first)
            larger.token_counts[source] = np.add.reduceat(counts[cells], first)
        return larger

    def bucket_counts(self, buckets: Sequence[Bucket]) -> dict[str, tuple[int, ...]]:
        """Give the number of tokens by source, bucket by bucket."""
        return {
            source: tuple(self.num_tokens(*bucket, source) for bucket in buckets)
            for source in self.token_counts
        }

    def curve(self, source: str | None = None) -> np.ndarray:
        """Give the mean loss of each cell [cells], nats; NaN where there is no token."""
        cells = zip(self.edges[:-1], self.edges[1:], strict=True)
        return np.array([self.mean(start, stop, source) for start, stop in cells])

    def _total(
        self, sums: dict[str, np.ndarray], start: int, stop: int, source: str | None
    ) -> float:
        cells = slice(self.edges.index(start), self.edges.index(stop))
        return float(sum(sums[name][cells].sum() for name in ([source] if source else sums)))

    def _sum_by_cell(self, losses: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        positions = np.flatnonzero(labels != UNSCORED)
        cells = np.searchsorted(self.edges, positions, side="right") - 1
        num_cells = len(self.edges) - 1
        weights = np.asarray(losses, dtype=np.float64)[positions]
        sums = np.bincount(cells, weights=weights, minlength=num_cells)
        return sums, np.bincount(cells, minlength=num_cells).astype(np.float64)

    def _add_sums(
        self, source: str, sums: np.ndarray, counts: np.ndarray, num_documents: int
    ) -> None:
        zeros = np.zeros(len(self.edges) - 1)
        self.loss_sums[source] = self.loss_sums.get(source, zeros) + sums
        self.token_counts[source] = self.token_counts.get(source, zeros) + counts
        self.num_documents[source] = self.num_documents.get(source, 0) + num_documents


def default_buckets(context_length: int) -> tuple[Bucket, Bucket]:
    """Give the near and the far bucket, split at 4096 tokens or an eighth of a shorter context.

    >>> default_buckets(131072), default_buckets(2048)
    (((0, 4096), (4096, 131072)), ((0, 256), (256, 2048)))
    """
    split = max(1, min(FIRST_BUCKET_TOKENS, context_length // 8))
    return (0, split), (split, context_length)


def cell_edges(context_length: int, buckets: Iterable[Bucket] = ()) -> tuple[int, ...]:
    """Give the edges of cells, equal on a log scale, with every bucket edge among them.

    >>> cell_edges(16, [(0, 9)])
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 16)
    """
    num_steps = int(np.ceil(np.log2(context_length) * CELLS_PER_OCTAVE))
    steps = {round(2 ** (step / CELLS_PER_OCTAVE)) for step in range(num_steps)}
    edges = {0, context_length} | steps | {edge for bucket in buckets for edge in bucket}
    return tuple(sorted(edge for edge in edges if edge <= context_length))


def count_positions(
    documents: Sequence[HeldOutDocument], context_length: int, buckets: Sequence[Bucket]
) -> dict[str, tuple[int, ...]]:
    """Give what `PositionLoss.bucket_counts` will be once these documents are scored."""
    counts: dict[str, tuple[int, ...]] = {}
    for document in documents:
        length = document.num_tokens(context_length)
        before = counts.get(document.source, (0,) * len(buckets))
        counts[document.source] = tuple(
            count + max(0, min(length, stop) - start)
            for count, (start, stop) in zip(before, buckets, strict=True)
        )
    return counts


def loss_by_position(
    scorer: TokenScorer,
    documents: Sequence[HeldOutDocument],
    buckets: Iterable[Bucket],
    *,
    micro_batch_size: int = 1,
    on_scored: Callable[[], object] = lambda: None,
) -> PositionLoss:
    """Score all documents, split over the data-parallel ranks; every rank gets the total.

    Args:
        micro_batch_size: Documents of the full context length that share a batch; shorter ones share
            it in greater number.
        on_scored: Called after each document of this rank, for a progress bar.
    Raises: DataError: the model gives a loss that is not finite.
    """
    edges = cell_edges(scorer.context_length, buckets)
    local = PositionLoss(edges)
    rounds = score_rows(
        scorer,
        [document.num_tokens(scorer.context_length) for document in documents],
        lambda index: documents[index].row(scorer.context_length),
        tokens_per_batch=micro_batch_size * scorer.context_length,
    )
    for round_scores in rounds:
        for index, scores in round_scores.items():
            # Every input token of a document has a next token, so all its positions count.
            local.add(documents[index].source, scores.losses, np.zeros(len(scores.losses)))
            on_scored()
    total = PositionLoss(edges)
    for part in scorer.gather(local):
        total.merge(part)
    _check_finite(total)
    return total


def parse_buckets(text: str, context_length: int) -> tuple[Bucket, ...]:
    """Read `--buckets`.

    Raises: ConfigError: not a list of intervals, or one beyond the context.

    >>> parse_buckets("0-4K,4096-128K", 131072)
    ((0, 4096), (4096, 131072))
    """
    try:
        pairs = [part.split("-") for part in text.split(",")]
        buckets = tuple((_position(start), _position(stop)) for start, stop in pairs)
    except (ValueError, argparse.ArgumentTypeError):
        raise ConfigError(
            f"--buckets {text!r} is not a list of intervals; write positions in tokens like "
            "0-4096,4096-131072"
        ) from None
    for start, stop in buckets:
        if not 0 <= start < stop <= context_length:
            raise ConfigError(
                f"--buckets {start}-{stop} does not lie within --context-length {context_length}; "
                f"give intervals with 0 <= start < end <= {context_length}"
            )
    return buckets


def _position(text: str) -> int:
    return 0 if text.strip() == "0" else length_tokens(text)


def _check_finite(total: PositionLoss) -> None:
    for source, sums in total.loss_sums.items():
        if not np.isfinite(sums).all():
            raise DataError(
                f"the model's loss on {source} is not finite: the checkpoint is damaged, or its "
                "settings (--rotary-base, precision) do not fit it"
            )
