"""Summarize the results of all phases in a few tables and figures: `summarize.py RESULTS`.

Writes summary.md, history.png (retrieval against tokens trained), books.png, sources.png (loss by position
before and after) and mixtures.png next to them. Missing results are omitted.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_long.cli import run_tool, tool_parser
from megatron_long.errors import ConfigError
from megatron_long.evaluation.loss.loss_report import (
    LossReport,
    format_bucket,
    format_tokens,
    read_loss_report,
)
from megatron_long.evaluation.loss.loss_table import build_table, format_loss_table, table_figure
from megatron_long.evaluation.needle.needle_report import NeedleReport, read_needle_report
from megatron_long.evaluation.needle.needle_scores import NeedleResult
from megatron_long.evaluation.report.plots import (
    needle_history_figure,
    plot_position_curves,
    save_figure,
)
from megatron_long.files import atomic_path

MIXTURES = ("original", "cut", "upsample-book", "per-source", "per-source-seed1")


@dataclass(frozen=True)
class Results:
    """The folder of results, and the settings of the run next to it."""

    folder: Path
    settings: dict

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step."""
        return int(self.settings["global_batch_windows"] * self.settings["seq_length"])

    def loss(self, model: str, name: str) -> LossReport | None:
        path = self.folder / model / f"{name}.json"
        return read_loss_report(path) if path.is_file() else None

    def needle(self, model: str) -> NeedleReport | None:
        path = self.folder / model / "needle" / "needle.json"
        return read_needle_report(path) if path.is_file() else None


def history(results: Results) -> list[tuple[str, list[NeedleResult]]]:
    """Cells of the coarse grid, from the start to the end of the main run, labelled by tokens trained."""
    steps = [*results.settings["history_steps"], results.settings["main_steps"]]
    names = ["before", *(f"step-{step}" for step in steps[:-1]), "after"]
    entries = []
    for name, step in zip(names, [0, *steps], strict=True):
        report = results.needle(name)
        if report is None and step == results.settings["mixture_steps"]:
            report = results.needle("per-source")
        if report is not None:
            cells = coarse(report.results, results.settings)
            entries.append((f"{step * results.step_tokens / 1e6:.1f}M tokens", cells))
    return entries


def coarse(cells: Sequence[NeedleResult], settings: dict) -> list[NeedleResult]:
    """Those cells that the coarse grid has too."""
    depths = np.linspace(0, 1, settings["history_depths"])
    return [
        cell
        for cell in cells
        if cell.context_length in settings["history_lengths"]
        and np.isclose(depths, cell.depth).any()
    ]


def found(cells: Sequence[NeedleResult], lengths: Sequence[int]) -> list[str]:
    """Share found exactly and log-likelihood at each length."""
    texts = []
    for length in lengths:
        part = [cell for cell in cells if cell.context_length == length]
        exact = np.mean([cell.is_exact for cell in part]) if part else math.nan
        likely = np.mean([cell.log_likelihood for cell in part]) if part else math.nan
        texts.append(f"{exact:.0%} ({likely:.2f})" if part else "-")
    return texts


def needle_table(results: Results) -> list[str]:
    """Retrieval by length, of every model that was measured."""
    settings = results.settings
    names = ["before", *(f"step-{s}" for s in settings["history_steps"]), "after", *MIXTURES]
    lengths = settings["history_lengths"]
    rows = []
    for name in names:
        report = results.needle(name)
        if report is None:
            continue
        cells = coarse(report.results, settings)
        for task in report.settings.tasks:
            mine = [cell for cell in cells if cell.task == task]
            rows.append([name, task, *found(mine, lengths)])
    header = ["model", "task", *map(format_tokens, lengths)]
    return ["## Needle: found exactly (nats per answer token)", *markdown(header, rows)]


def perplexity_table(results: Results) -> list[str]:
    """Perplexity of the held-out books by window."""
    rows, header = [], ["model"]
    for name in ("before", "new-base", "after", *MIXTURES):
        report = results.loss(name, "books")
        if report is None:
            continue
        buckets = report.settings.buckets
        header = ["model", *(format_bucket(bucket) for bucket in buckets)]
        means = [report.loss.mean(*bucket) for bucket in buckets]
        rows.append([name, *(f"{math.exp(min(mean, 50)):.2f}" for mean in means)])
    return ["## Perplexity of held-out books by positions", *markdown(header, rows)]


def source_tables(results: Results) -> list[str]:
    """Loss by source: before and after, then the mixtures with differences to `original`."""
    texts = ["## Loss by source"]
    for names in (("before", "new-base", "after"), MIXTURES):
        reports = [
            (name, report)
            for name in names
            if (report := results.loss(name, "sources")) is not None
        ]
        if len(reports) > 1:
            table = build_table(reports)
            texts += ["```", format_loss_table(table), "```"]
            figure = "mixtures.png" if names == MIXTURES else "before-after.png"
            save_figure(table_figure(table), results.folder / figure)
    return texts


def sweep_table(results: Results) -> list[str]:
    """Held-out loss of each learning rate."""
    rows, header = [], ["learning rate"]
    for path in sorted(
        results.folder.glob("sweep-*/loss-sweep.json"),
        key=lambda path: float(path.parent.name.removeprefix("sweep-")),
    ):
        report = read_loss_report(path)
        header = ["learning rate", *(format_bucket(b) for b in report.settings.buckets)]
        means = [report.loss.mean(*bucket) for bucket in report.settings.buckets]
        rows.append([path.parent.name.removeprefix("sweep-"), *(f"{mean:.4f}" for mean in means)])
    return ["## Learning rates", *markdown(header, rows)]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table, or a note if it is empty."""
    if not rows:
        return ["not measured"]
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def figures(results: Results) -> None:
    """Draw the existing results."""
    entries = history(results)
    if len(entries) > 1:
        save_figure(needle_history_figure(entries), results.folder / "history.png")
    for name in ("books", "sources"):
        first, last = results.loss("before", name), results.loss("after", name)
        if first is not None and last is not None:
            plot_position_curves(
                results.folder / f"{name}.png",
                last.loss,
                first.loss,
                title=f"Loss by position, {name}: before and after",
                training_length=results.settings["original_length"],
            )


def main() -> None:
    """Read, draw, write."""
    parser = tool_parser(__doc__)
    parser.add_argument("results", type=Path, help="folder results/ of a work folder")
    folder: Path = parser.parse_args().results
    settings = folder.parent / "settings.json"
    if not settings.is_file():
        raise ConfigError(f"{settings} does not exist; give the folder results/ of a work folder")
    results = Results(folder, json.loads(settings.read_text()))
    figures(results)
    sections = [
        sweep_table(results),
        perplexity_table(results),
        source_tables(results),
        needle_table(results),
    ]
    text = "\n\n".join("\n".join(section) for section in sections)
    with atomic_path(folder / "summary.md") as temporary:
        temporary.write_text(f"# Results\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    sys.exit(run_tool(main))
