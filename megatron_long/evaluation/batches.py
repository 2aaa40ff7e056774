"""Rows of any length through a scorer, in batches whose rows are about equally long.

A forward pass costs at least in proportion to the tokens in it, padding included. So rows are
sorted by length and put together with their like: one row of the longest, or many short ones, up
to the same number of tokens. Rows are padded on the right, which a causal model cannot see. The
longest come first: what does not fit into memory fails in the first minute.

Legend: b rows of a batch, s padded length of the batch, n tokens of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megatron_long.model.labels import UNSCORED

if TYPE_CHECKING:
    import torch

SHAPES_PER_OCTAVE = 32
"""Padded lengths between n and 2n: padding stays below 3%, and kernels meet few shapes to plan for."""


@dataclass(frozen=True)
class TokenScores:
    """What a model thinks of each label."""

    losses: torch.Tensor
    """Negative log-likelihood of the label [b, s], float32, nats; 0 where not scored."""
    is_greedy: torch.Tensor
    """Whether the label is the most likely token of the real vocabulary [b, s], bool; True where not
    scored."""


class TokenScorer(Protocol):
    """A model, sharded or not, that scores batches; replicas may be given different ones."""

    context_length: int
    """Longest row, tokens."""
    length_step: int
    """Padded lengths are multiples of this."""
    data_parallel_rank: int
    data_parallel_size: int
    is_writer: bool
    """Whether this process writes files."""

    def score(self, tokens: torch.Tensor, labels: torch.Tensor) -> TokenScores:
        """Score tokens and labels [b, s]; collective over the ranks of one replica."""
        ...

    def gather(self, value: Any) -> list:
        """Collect an object of every replica, on each."""
        ...

    def agree(self, value: Any) -> Any:
        """Give every process the value of the first one."""
        ...

    def close(self) -> None:
        """End the job."""
        ...


@dataclass(frozen=True)
class Row:
    """Input tokens and the label of each position."""

    tokens: np.ndarray
    """Token ids [n]."""
    labels: np.ndarray
    """Next token at each position [n], or `UNSCORED`."""


@dataclass(frozen=True)
class RowScores:
    """What the model made of one row."""

    losses: np.ndarray
    """Loss of each label [n], float32, nats; 0 where not scored."""
    is_greedy: np.ndarray
    """Whether each label is the most likely token [n], bool; True where not scored."""


@dataclass(frozen=True)
class Batch:
    """Rows that share a forward pass."""

    rows: tuple[int, ...]
    """Indices of the rows, longest first."""
    padded_length: int
    """Tokens of each after padding, s."""


def plan_batches(
    lengths: Sequence[int], *, tokens_per_batch: int, longest: int, step: int = 1
) -> list[Batch]:
    """Put rows of similar length together, longest first.

    Args:
        lengths: Tokens of each row.
        tokens_per_batch: Most tokens of a batch, padding included; a single row may exceed it.
        longest: Padding never goes beyond this length, a multiple of `step`.
        step: Padded lengths are multiples of it.
    Returns: Batches that hold each row once.

    >>> plan_batches([100, 10, 9, 12], tokens_per_batch=100, longest=100, step=4)
    [Batch(rows=(0,), padded_length=100), Batch(rows=(3, 1, 2), padded_length=12)]
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches = []
    while order:
        padded = pad_length(lengths[order[0]], longest=longest, step=step)
        number = max(1, tokens_per_batch // padded)
        batches.append(Batch(tuple(order[:number]), padded))
        order = order[number:]
    return batches


def pad_length(length: int, *, longest: int, step: int) -> int:
    """Round a length up to one of `SHAPES_PER_OCTAVE` shapes that are multiples of `step`.

    >>> pad_length(1000, longest=4096, step=8), pad_length(4090, longest=4096, step=8)
    (1008, 4096)
    """
    grain = max(1, 2 ** (length.bit_length() - 1) // SHAPES_PER_OCTAVE)
    rounded = -(-length // grain) * grain
    return min(-(-rounded // step) * step, longest)


def score_rows(
    scorer: TokenScorer,
    lengths: Sequence[int],
    read_row: Callable[[int], Row],
    *,
    tokens_per_batch: int,
    may_go_on: Callable[[], bool] = lambda: True,
) -> Iterator[dict[int, RowScores]]:
    """Score rows in rounds: in each, every replica does one batch, of about the same work.

    Every rank of every replica must call this with the same rows.

    Args:
        lengths: Tokens of each row, at most `scorer.context_length`.
        read_row: Gives row i. Called batch by batch, because all rows at 128K tokens would take
            gigabytes.
        may_go_on: Asked before each round; must answer alike on every process.
    Returns: Scores of this replica's rows of each round (none where it had no batch).
    """
    batches = plan_batches(
        lengths,
        tokens_per_batch=tokens_per_batch,
        longest=scorer.context_length,
        step=scorer.length_step,
    )
    for start in range(0, len(batches), scorer.data_parallel_size):
        if not may_go_on():
            return
        mine = start + scorer.data_parallel_rank
        yield _score_batch(scorer, batches[mine], read_row) if mine < len(batches) else {}


def _score_batch(
    scorer: TokenScorer, batch: Batch, read_row: Callable[[int], Row]
) -> dict[int, RowScores]:
    import torch

    rows = [read_row(index) for index in batch.rows]
    tokens, labels = pad_rows(rows, (len(rows), batch.padded_length))
    scores = scorer.score(torch.from_numpy(tokens), torch.from_numpy(labels))
    losses, is_greedy = scores.losses.numpy(), scores.is_greedy.numpy()
    return {
        index: RowScores(losses[place, : len(row.tokens)], is_greedy[place, : len(row.tokens)])
        for place, (index, row) in enumerate(zip(batch.rows, rows, strict=True))
    }


def pad_rows(rows: Sequence[Row], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Give tokens and labels [b, s], int64, padded with token 0 and `UNSCORED`.

    >>> tokens, labels = pad_rows([Row(np.array([5, 6]), np.array([6, 7]))], (2, 3))
    >>> tokens.tolist(), labels.tolist()
    ([[5, 6, 0], [0, 0, 0]], [[6, 7, -1], [-1, -1, -1]])
    """
    tokens = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, UNSCORED, dtype=np.int64)
    for place, row in enumerate(rows):
        assert len(row.tokens) == len(row.labels) <= shape[1], "row longer than the context"
        tokens[place, : len(row.tokens)] = row.tokens
        labels[place, : len(row.labels)] = row.labels
    return tokens, labels
