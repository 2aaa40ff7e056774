"""Rows of any length through a scorer of one fixed shape.

A scorer takes [b, s] with b and s fixed for the whole run (pipeline stages agree on the shape
once), while documents and needle cases have their own lengths. Rows are padded on the right, which
a causal model cannot see, and the last batch is filled with empty rows.

Legend: b rows of a batch, s sequence (the scorer's context length), n tokens of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from megatron_long.evaluation.scoring import Scorer

NOT_SCORED = -1
"""Label of a position that is not scored."""


@dataclass(frozen=True)
class Row:
    """Input tokens and the label of each position."""

    tokens: np.ndarray
    """Token ids [n]."""
    labels: np.ndarray
    """Next token at each position [n], or `NOT_SCORED`."""


@dataclass(frozen=True)
class RowScores:
    """What the model made of one row."""

    losses: np.ndarray
    """Loss of each label [n], float32, nats; 0 where not scored."""
    is_greedy: np.ndarray
    """Whether each label is the most likely token [n], bool; True where not scored."""


def score_rows(
    scorer: Scorer, num_rows: int, read_row: Callable[[int], Row], *, micro_batch_size: int
) -> Iterator[RowScores]:
    """Score rows in order, `micro_batch_size` at a time.

    Every rank of a model-parallel group must call this with the same rows. Groups may have
    different numbers of rows.

    Args:
        read_row: Gives row i, of at most `scorer.context_length` tokens. Called batch by batch,
            because all rows at 128K tokens would take gigabytes.
        micro_batch_size: Rows a batch; the last batch is filled with rows of no labels.
    Returns: Scores of rows 0 to `num_rows` - 1, as soon as their batch is done.
    """
    import torch

    for indices in batched(range(num_rows), micro_batch_size):
        batch = [read_row(index) for index in indices]
        tokens, labels = pad_rows(batch, (micro_batch_size, scorer.context_length))
        scores = scorer.score(torch.from_numpy(tokens), torch.from_numpy(labels))
        losses, is_greedy = scores.losses.numpy(), scores.is_greedy.numpy()
        for place, row in enumerate(batch):
            num_tokens = len(row.tokens)
            yield RowScores(losses[place, :num_tokens], is_greedy[place, :num_tokens])


def pad_rows(rows: Sequence[Row], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Give tokens and labels [b, s], int64, padded with token 0 and `NOT_SCORED`.

    >>> tokens, labels = pad_rows([Row(np.array([5, 6]), np.array([6, 7]))], (2, 3))
    >>> tokens.tolist(), labels.tolist()
    ([[5, 6, 0], [0, 0, 0]], [[6, 7, -1], [-1, -1, -1]])
    """
    tokens = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, NOT_SCORED, dtype=np.int64)
    for place, row in enumerate(rows):
        assert len(row.tokens) == len(row.labels) <= shape[1], "row longer than the context"
        tokens[place, : len(row.tokens)] = row.tokens
        labels[place, : len(row.labels)] = row.labels
    return tokens, labels
