"""The paper's Table 5: what a mixture does to the loss of each source, near and far in the document.

One block a bucket of positions, one column a source; the first row is the loss of the baseline, each
further row the difference to it. Differences beyond 0.01 nats count as significant.

Source: Fu et al. 2024, arXiv 2402.10171, table 5 and section 5.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_long.evaluation.loss.loss_report import (
    ALL_SOURCES,
    SIGNIFICANT_NATS,
    LossReport,
    format_bucket,
)
from megatron_long.evaluation.loss.position_loss import Bucket
from megatron_long.evaluation.report.plots import save_figure
from megatron_long.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BETTER, WORSE, NEITHER = "#C7E9C0", "#FCBBA1", "white"
"""Cells of significant differences: green below, red above."""

LEAST_WIDTH = 7.0
"""Inches; the title must fit."""


@dataclass(frozen=True)
class LossTable:
    """Losses of a baseline and differences to it."""

    names: tuple[str, ...]
    """Of the reports; the baseline first."""
    sources: tuple[str, ...]
    """Columns; the last one is all of them."""
    buckets: tuple[Bucket, ...]
    losses: tuple[tuple[tuple[float, ...], ...], ...]
    """[bucket][report][source], nats per token; NaN where there is no token."""

    def difference(self, bucket: int, report: int, source: int) -> float:
        """Give what a report's loss is above the baseline's, nats."""
        block = self.losses[bucket]
        return block[report][source] - block[0][source]

    def is_significant(self, bucket: int, report: int, source: int) -> bool:
        """Whether a difference is beyond `SIGNIFICANT_NATS`."""
        return abs(self.difference(bucket, report, source)) > SIGNIFICANT_NATS


def build_table(reports: Sequence[tuple[str, LossReport]]) -> LossTable:
    """Put reports side by side.

    Args:
        reports: Names and reports on the same documents, the baseline first; all have the bucket
            edges of the last.
    """
    last = reports[-1][1]
    sources = tuple(last.loss.loss_sums)
    columns: list[str | None] = [*sources, None]
    return LossTable(
        names=tuple(name for name, _ in reports),
        sources=(*sources, ALL_SOURCES),
        buckets=last.settings.buckets,
        losses=tuple(
            tuple(
                tuple(report.loss.mean(*bucket, source) for source in columns)
                for _, report in reports
            )
            for bucket in last.settings.buckets
        ),
    )


def format_loss_table(table: LossTable) -> str:
    """Give the table as text; significant differences end with `*`."""
    rows = [["", *table.sources]]
    for bucket, interval in enumerate(table.buckets):
        rows.append([f"{format_bucket(interval)} tokens", *([""] * len(table.sources))])
        for report, name in enumerate(table.names):
            cells = [_cell(table, bucket, report, i) for i in range(len(table.sources))]
            rows.append([f"  {name}", *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    return "\n".join(
        [
            f"Loss of {table.names[0]} in nats per token, and differences to it",
            *lines,
            f"* beyond {SIGNIFICANT_NATS} nats",
        ]
    )


def write_loss_csv(path: Path, table: LossTable) -> None:
    """Write one line a bucket, report and source."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["positions", "model", "source", "loss_nats", "difference_nats", "is_significant"]
        )
        for bucket, (start, stop) in enumerate(table.buckets):
            for report, name in enumerate(table.names):
                for column, source in enumerate(table.sources):
                    loss = table.losses[bucket][report][column]
                    if math.isnan(loss):
                        continue
                    values = [f"{start}-{stop}", name, source, f"{loss:.6f}"]
                    values += [f"{table.difference(bucket, report, column):.6f}"]
                    is_significant = table.is_significant(bucket, report, column)
                    writer.writerow([*values, str(is_significant).lower()])


def table_figure(table: LossTable) -> Figure:
    """Draw the table, significant differences green (better) or red (worse)."""
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    num_rows = len(table.buckets) * (len(table.names) + 1) + 1
    name_width = max(1.6, max(map(len, table.names)) / 9 + 0.4)
    column_width = max(1.15, max(map(len, table.sources)) / 9 + 0.3)
    column_width = max(column_width, (LEAST_WIDTH - name_width) / len(table.sources))
    width = name_width + column_width * len(table.sources)
    figure = Figure(figsize=(width, 0.36 * num_rows + 0.7))
    axes = figure.subplots()
    axes.axis("off")
    text, colours = [["", *table.sources]], [[NEITHER] * (len(table.sources) + 1)]
    for bucket, interval in enumerate(table.buckets):
        text.append([f"{format_bucket(interval)} tokens", *([""] * len(table.sources))])
        colours.append(["#EEEEEE"] * (len(table.sources) + 1))
        for report, name in enumerate(table.names):
            columns = range(len(table.sources))
            text.append([name, *(_cell(table, bucket, report, i) for i in columns)])
            colours.append([NEITHER, *(_colour(table, bucket, report, i) for i in columns)])
    widths = [name_width / width, *([column_width / width] * len(table.sources))]
    drawn = axes.table(
        text, cellColours=colours, colWidths=widths, cellLoc="right", bbox=Bbox.unit()
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    for (row, column), cell in drawn.get_celld().items():
        cell.set_edgecolor("#BBBBBB")
        if column == 0:
            cell.set_text_props(ha="left")
        if row == 0 or text[row][1] == "":
            cell.set_text_props(weight="bold")
    axes.set_title(
        "First row: loss, nats per token; below: difference to it "
        f"(coloured beyond {SIGNIFICANT_NATS})",
        fontsize=10,
    )
    figure.subplots_adjust(
        left=0.01, right=0.99, bottom=0.02, top=1 - 0.45 / figure.get_figheight()
    )
    return figure


def _cell(table: LossTable, bucket: int, report: int, source: int) -> str:
    loss = table.losses[bucket][report][source]
    if math.isnan(loss):
        return "-"
    if report == 0:
        return f"{loss:.4f}"
    mark = "*" if table.is_significant(bucket, report, source) else ""
    return f"{table.difference(bucket, report, source):+.4f}{mark}"


def _colour(table: LossTable, bucket: int, report: int, source: int) -> str:
    if report == 0 or not table.is_significant(bucket, report, source):
        return NEITHER
    return BETTER if table.difference(bucket, report, source) < 0 else WORSE


def table_paths(output: Path) -> tuple[Path, Path]:
    """Where the CSV and the PNG of the table go, next to the report."""
    return output.with_name(f"{output.stem}-table.csv"), output.with_name(
        f"{output.stem}-table.png"
    )


def write_loss_table(output: Path, table: LossTable) -> list[Path]:
    """Write the table as CSV and as PNG next to the report; gives where."""
    csv_path, png_path = table_paths(output)
    write_loss_csv(csv_path, table)
    save_figure(table_figure(table), png_path)
    return [csv_path, png_path]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Name files by the fewest last parts of their paths that tell them apart.

    >>> distinct_names([Path("a/loss.json"), Path("b/loss.json")])
    ['a/loss', 'b/loss']
    >>> distinct_names([Path("a/before.json"), Path("b/loss.json")])
    ['before', 'loss']
    """
    whole = [path.resolve().with_suffix("").parts for path in paths]
    for number in range(1, max(map(len, whole), default=0)):
        names = ["/".join(parts[-number:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            return names
    return [str(path) for path in paths]
