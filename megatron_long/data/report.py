"""What a dataset holds, for people: the table by source and the figure of lengths and shares."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_long.data.manifest import SourceInfo

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


def source_table(sources: Mapping[str, SourceInfo]) -> Table:
    """Make the table of sources: documents, tokens, shares, share of tokens in long documents."""
    table = Table(*COLUMNS[:1], box=None, pad_edge=False)
    for column in COLUMNS[1:]:
        table.add_column(column, justify="right")
    tokens_in = sum(info.tokens_in for info in sources.values())
    for name, info in sources.items():
        table.add_row(name, *_cells(info, tokens_in))
    table.add_row("all", *_cells(add_sources(sources), tokens_in))
    return table


def print_sources(sources: Mapping[str, SourceInfo]) -> None:
    """Print the table of sources, wide enough for its columns when the output is a file."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(source_table(sources))


def add_sources(sources: Mapping[str, SourceInfo]) -> SourceInfo:
    """Add up all sources; shares of long tokens are weighted by tokens."""
    infos = list(sources.values())
    tokens_in = sum(info.tokens_in for info in infos)
    tokens_kept = sum(info.tokens_kept for info in infos)
    long_in = sum(info.long_share_before * info.tokens_in for info in infos)
    long_kept = sum(info.long_share_after * info.tokens_kept for info in infos)
    return SourceInfo(
        index=-1,
        share_asked=sum(info.share_asked for info in infos),
        share_got=sum(info.share_got for info in infos),
        documents_in=sum(info.documents_in for info in infos),
        tokens_in=tokens_in,
        documents_valid=sum(info.documents_valid for info in infos),
        tokens_valid=sum(info.tokens_valid for info in infos),
        documents_kept=sum(info.documents_kept for info in infos),
        tokens_kept=tokens_kept,
        long_share_before=long_in / max(tokens_in, 1),
        long_share_after=long_kept / max(tokens_kept, 1),
        tokens_by_length_before=_add_padded([info.tokens_by_length_before for info in infos]),
        tokens_by_length_after=_add_padded([info.tokens_by_length_after for info in infos]),
    )


def plot_sources(sources: Mapping[str, SourceInfo], threshold_tokens: int) -> "Figure":
    """Draw token shares by document length and by source, in the corpus and in the training set.

    Args:
        threshold_tokens: Where long documents begin; drawn as a line.
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
    shares = {
        "corpus": [sources[name].tokens_in / tokens_in for name in names],
        "training set": [sources[name].tokens_kept / tokens_kept for name in names],
    }
    for shift, label in ((-0.2, "corpus"), (0.2, "training set")):
        for axes, values in ((by_length, lengths[label]), (by_source, shares[label])):
            axes.bar(np.arange(len(values)) + shift, 100 * np.array(values), 0.4, label=label)
    num_buckets = max(map(len, lengths.values()))
    ticks = [f"{2**k / 1024:g}K" if k >= 10 else f"{2**k}" for k in range(num_buckets)]
    by_length.set_xticks(np.arange(num_buckets) - 0.5, ticks, rotation=45)
    first = int(np.argmax(lengths["corpus"] > 0))
    by_length.set_xlim(first - 0.6, num_buckets - 0.4)
    by_length.axvline(np.log2(threshold_tokens) - 0.5, color="gray", linestyle=":", label="long")
    by_length.set(xlabel="document length (tokens)", ylabel="% of tokens", title="By length")
    by_source.set_xticks(np.arange(len(names)), names, rotation=30, ha="right")
    by_source.set(ylabel="% of tokens", title="By source")
    by_length.legend()
    by_source.legend()
    return figure


def _cells(info: SourceInfo, tokens_in: int) -> list[str]:
    counts = (info.documents_in, info.tokens_in, info.documents_kept, info.tokens_kept)
    shares = (
        info.tokens_in / max(tokens_in, 1),
        info.share_asked,
        info.share_got,
        info.long_share_before,
        info.long_share_after,
    )
    numbers = [f"{count:,}" for count in (*counts, info.tokens_valid)]
    return numbers + [f"{100 * share:.2f}%" for share in shares]


def _add_padded(rows: list[list[int]]) -> list[int]:
    total = np.zeros(max(map(len, rows), default=0), np.int64)
    for row in rows:
        total[: len(row)] += np.array(row, np.int64)
    return total.tolist()
