"""Human-readable summary of a dataset: the table by source and the figure of lengths and shares."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_long.dataset.manifest import SourceInfo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "source",
    "docs in",
    "tokens in",
    "docs kept",
    "tokens kept",
    "tokens valid",
    "share in",
    "asked",
    "got",
    "long before",
    "long after",
)


def print_sources(sources: Mapping[str, SourceInfo]) -> None:
    """Print documents, tokens, shares, and shares of tokens in long documents, of each source and of all."""
    tokens_in = sum(info.tokens_in for info in sources.values())
    every = [*sources.items(), ("all", add_sources(sources))]
    print_table(COLUMNS, [[name, *_cells(info, tokens_in)] for name, info in every])


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of text, wide enough for its columns when the output is a file."""
    table = Table(box=None, pad_edge=False)
    for place, column in enumerate(header):  # folded: no digit is left out
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


def add_sources(sources: Mapping[str, SourceInfo]) -> SourceInfo:
    """Add up all sources: counts and shares are summed, ratios are weighted by tokens.

    A ratio refers to the training set if its name ends in `_after`, and to the corpus otherwise.
    """
    infos = list(sources.values())
    total: dict[str, Any] = {}
    for field in dataclasses.fields(SourceInfo):
        values = [getattr(info, field.name) for info in infos]
        kept = field.name.endswith("_after")
        weights = [info.tokens_kept if kept else info.tokens_in for info in infos]
        if all(isinstance(value, list) for value in values):
            total[field.name] = _add_padded(values)
        elif all(isinstance(value, bool) for value in values):
            total[field.name] = all(values)
        elif field.name.startswith("share_") or all(isinstance(value, int) for value in values):
            total[field.name] = sum(values)
        elif all(isinstance(value, int | float) for value in values):
            weighted = sum(value * weight for value, weight in zip(values, weights, strict=True))
            total[field.name] = weighted / max(sum(weights), 1)
        else:
            total[field.name] = values[0]
    total["share_in_error"] = 0.0
    total |= _errors_of_sum(infos, total["tokens_in"], total["long_share_before"])
    return SourceInfo(**total | {"index": -1})


def _errors_of_sum(infos: Sequence[SourceInfo], tokens: int, long_share: float) -> dict[str, Any]:
    """Return the bounds of the errors of all sources together: they are independent, so squares add up.

    The share of long tokens also errs by the weights of the sources; a source's two errors may go together.
    """
    tokens_in = math.hypot(*(info.tokens_in_error for info in infos))
    long_errors = [
        info.tokens_in * info.long_share_before_error
        + info.tokens_in_error * abs(info.long_share_before - long_share)
        for info in infos
    ]
    return {
        "tokens_in_error": round(tokens_in),
        "long_share_before_error": math.hypot(*long_errors) / max(tokens, 1),
    }


def plot_sources(sources: Mapping[str, SourceInfo], threshold_tokens: int) -> "Figure":
    """Draw token shares by document length and by source, in the corpus and in the training set.

    Args:
        threshold_tokens: Where long documents begin: a line on the left; on the right long documents
            are the full colour of a bar.
    Source: Fu et al. 2024, figure 2 (length and domain distributions of the mixtures).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    by_length, by_source = figure.subplots(1, 2)
    total, names = add_sources(sources), list(sources)
    tokens_in, tokens_kept = max(total.tokens_in, 1), max(total.tokens_kept, 1)
    lengths = {
        "corpus": np.array(total.tokens_by_length_before) / tokens_in,
        "training set": np.array(total.tokens_by_length_after) / tokens_kept,
    }
    infos = [sources[name] for name in names]
    shares = {
        "corpus": [(info.tokens_in / tokens_in, info.long_share_before) for info in infos],
        "training set": [(info.tokens_kept / tokens_kept, info.long_share_after) for info in infos],
    }
    for shift, label, colour in ((-0.2, "corpus", "C0"), (0.2, "training set", "C1")):
        values = 100 * lengths[label]
        by_length.bar(np.arange(len(values)) + shift, values, 0.4, label=label, color=colour)
        share, long_share = 100 * np.array(shares[label]).reshape(-1, 2).T
        at, is_long = np.arange(len(names)) + shift, share * long_share / 100
        by_source.bar(at, is_long, 0.4, label=label, color=colour)
        by_source.bar(at, share - is_long, 0.4, bottom=is_long, color=colour, alpha=0.35)
    num_buckets = max(map(len, lengths.values()))
    ticks = [f"{2**k / 1024:g}K" if k >= 10 else f"{2**k}" for k in range(num_buckets)]
    by_length.set_xticks(np.arange(num_buckets) - 0.5, ticks, rotation=45)
    first = int(np.argmax(lengths["corpus"] > 0))
    by_length.set_xlim(first - 0.6, num_buckets - 0.4)
    by_length.axvline(np.log2(threshold_tokens) - 0.5, color="gray", linestyle=":", label="long")
    by_length.set(xlabel="document length (tokens)", ylabel="% of tokens", title="By length")
    by_source.set_xticks(np.arange(len(names)), names, rotation=30, ha="right")
    by_source.set(ylabel="% of tokens", title="By source (pale: in short documents)")
    by_length.legend()
    by_source.legend()
    return figure


def share_text(share: float, error: float = 0.0) -> str:
    """Write a share, with the bound of its error if it has one.

    >>> share_text(0.614, 0.0021), share_text(1)
    ('61.40% ±0.21', '100.00%')
    """
    return f"{100 * share:.2f}%" + (f" ±{100 * error:.2f}" if error else "")


def short_count(number: float, digits: int = 3) -> str:
    """Write a count with three digits, or more.

    >>> short_count(627_312_000_000), short_count(1_234_567), short_count(12), short_count(26_815_641, 4)
    ('627B', '1.23M', '12', '26.82M')
    """
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            decimals = max(digits - len(f"{number / size:.0f}"), 0)
            return f"{number / size:.{decimals}f}{unit}"
    return f"{number:.0f}"


def _cells(info: SourceInfo, tokens_in: int) -> list[str]:
    counts = (info.documents_in, info.tokens_in, info.documents_kept, info.tokens_kept)
    return [
        *(f"{count:,}" for count in (*counts, info.tokens_valid)),
        share_text(info.tokens_in / max(tokens_in, 1), info.share_in_error),
        share_text(info.share_asked),
        share_text(info.share_got),
        share_text(info.long_share_before, info.long_share_before_error),
        share_text(info.long_share_after),
    ]


def _add_padded(rows: list[list[int]]) -> list[int]:
    total = np.zeros(max(map(len, rows), default=0), np.int64)
    for row in rows:
        total[: len(row)] += np.array(row, np.int64)
    return total.tolist()
