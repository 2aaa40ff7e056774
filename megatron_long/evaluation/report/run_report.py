"""The report of a run as one HTML page that holds its figures: it opens from a file, without a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_long.evaluation.loss.loss_report import LossReport, difference_between
from megatron_long.evaluation.loss.loss_table import LossTable, build_table, table_figure
from megatron_long.evaluation.needle.needle_report import NeedleReport, format_summary
from megatron_long.evaluation.report.plots import (
    SOURCE_COLOURS,
    heatmap_figure,
    needle_history_figure,
    position_figure,
    ruler_figure,
)
from megatron_long.evaluation.report.run_files import Curve, Measured, RunFiles, format_count
from megatron_long.evaluation.ruler.ruler_report import (
    RulerReport,
    effective_length,
    notes,
    table_rows,
)
from megatron_long.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; } img { max-width: 100%; }
pre { background: #f4f4f4; padding: .7em 1em; overflow-x: auto; } .note { color: #666; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .9em; text-align: right; } th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1px solid #888; } tbody tr:nth-child(even) { background: #f4f4f4; }
</style></head><body>
<h1>{{ title }}</h1>
{% for section in sections %}<h2 id="{{ section.anchor }}">{{ section.title }}</h2>
{% for text in section.texts %}<p>{{ text }}</p>
{% endfor %}{% if section.rows %}<div style="overflow-x: auto"><table><thead><tr>
{% for cell in section.rows[0] %}<th>{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{% for row in section.rows[1:] %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endif %}
{% for alt, data in section.images %}<p><img alt="{{ alt }}" src="data:image/png;base64,{{ data }}"></p>
{% endfor %}{% if section.plain %}<pre>{{ section.plain }}</pre>{% endif %}
{% endfor %}{% if notes %}<h2>Left out</h2>
{% for note in notes %}<p class="note">{{ note }}</p>{% endfor %}{% endif %}
</body></html>
"""
"""Filled by Jinja2, which escapes whatever comes from files."""

RESOLUTION_DPI = 110

AVERAGED_STEPS = 10
"""Of the training loss at both ends: that of one step is noise."""


class Section:
    """One heading of the page with what stands below it."""

    def __init__(self, title: str, *texts: str) -> None:
        self.title, self.anchor = title, title.lower().replace(" ", "-")
        self.texts = list(texts)
        self.rows: list[list[str]] = []
        self.images: list[tuple[str, str]] = []
        self.plain = ""

    def add_figure(self, alt: str, figure: Figure) -> None:
        """Put a figure into the page."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=RESOLUTION_DPI)
        self.images.append((alt, base64.b64encode(buffer.getvalue()).decode("ascii")))


def write_run_report(path: Path, found: RunFiles) -> None:
    """Write the page, whole or not at all."""
    page = run_report_page(found)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def run_report_page(found: RunFiles) -> str:
    """Give the page as text."""
    import jinja2

    sections = [
        _mixture_section(found),
        *_training_sections(found.curves),
        *_needle_sections(found.needles),
        *_loss_sections(found.losses),
        *_ruler_sections(found.rulers),
    ]
    return (
        jinja2.Environment(autoescape=True)
        .from_string(TEMPLATE)
        .render(
            title=f"Run {found.folder.resolve().name}",
            sections=[section for section in sections if section is not None],
            notes=found.left_out,
        )
    )


def _mixture_section(found: RunFiles) -> Section | None:
    if found.manifest is None:
        return None
    from megatron_long.dataset.tables import plot_sources, share_text

    manifest = found.manifest
    section = Section(
        "Mixture",
        f"{manifest.train.num_tokens:,} training tokens in {manifest.train.num_documents:,} documents; "
        f"strategy {manifest.mixture.get('strategy')}, seed {manifest.seed}, fingerprint "
        f"{manifest.fingerprint[:16]}. Dataset: {found.dataset}",
    )
    header = "source, documents, tokens, share, in long documents before, after"
    section.rows = [header.split(", ")]
    kept = max(1, sum(info.tokens_kept for info in manifest.sources.values()))
    for name, info in manifest.sources.items():
        counts = [f"{info.documents_kept:,}", f"{info.tokens_kept:,}"]
        shares = [
            share_text(info.tokens_kept / kept),
            share_text(info.long_share_before, info.long_share_before_error),
            share_text(info.long_share_after),
        ]
        section.rows.append([name, *counts, *shares])
    figure = plot_sources(manifest.sources, manifest.mixture["long_threshold_tokens"])
    section.add_figure("token shares by document length and by source", figure)
    return section


def _training_sections(curves: Sequence[Curve]) -> list[Section]:
    if not curves:
        return []
    section = Section(
        "Training loss",
        f"Losses are means over the first and the last {AVERAGED_STEPS} logged steps; where a run has fewer "
        "than twice as many, over half of them.",
    )
    section.rows = [["run", "steps", "tokens", "first loss", "last loss", "mean of steps"]]
    for curve in curves:
        tokens = format_count(curve.tokens[-1]) if curve.tokens else "-"
        number = max(1, min(AVERAGED_STEPS, len(curve.losses) // 2))
        ends = (curve.losses[:number], curve.losses[-number:])
        losses = [f"{np.mean(losses):.4f}" for losses in ends]
        steps = f"{curve.steps[0]}-{curve.steps[-1]}"
        section.rows.append([curve.name, steps, tokens, *losses, str(number)])
    section.add_figure("training loss by step", _loss_figure(curves))
    rated = [curve for curve in curves if curve.tokens_per_second]
    if not rated:
        return [section]
    throughput = Section("Throughput", *_rate_captions(rated))
    throughput.rows = [["run", "median tokens/s", "median TFLOP/s/GPU"]]
    for curve in rated:
        tflops = f"{np.median(curve.tflops):.1f}" if curve.tflops else "-"
        median = np.median([rate for _, rate in curve.tokens_per_second])
        throughput.rows.append([curve.name, f"{median:,.0f}", tflops])
    throughput.add_figure("tokens a second by step", _rate_figure(rated))
    return [section, throughput]


def _rate_captions(curves: Sequence[Curve]) -> list[str]:
    """Say what the seconds are, which depends on what was logged."""
    captions = {
        False: "Tokens a second of the whole job, between logged steps; checkpoints count",
        True: "Tokens a second of the whole job by its step timer; evaluation and checkpoints do not count",
    }
    kinds = {curve.is_timed for curve in curves}
    names = {kind: [curve.name for curve in curves if curve.is_timed is kind] for kind in kinds}
    return [
        f"{captions[kind]}{f' ({", ".join(names[kind])})' if len(kinds) > 1 else ''}."
        for kind in sorted(kinds)
    ]


def _loss_figure(curves: Sequence[Curve]) -> Figure:
    lines = [(curve.name, curve.steps, curve.losses) for curve in curves]
    return _curves_figure(lines, "training loss (nats per token)", height=4)


def _rate_figure(curves: Sequence[Curve]) -> Figure:
    lines = [(curve.name, *zip(*curve.tokens_per_second, strict=True)) for curve in curves]
    figure = _curves_figure(lines, "tokens a second", height=3)
    figure.axes[0].set_ylim(bottom=0)
    return figure


def _curves_figure(lines: Sequence[tuple[Any, ...]], label: str, height: float) -> Figure:
    """Draw lines over steps; of each its name, steps and values."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    for place, (name, steps, values) in enumerate(lines):
        colour = SOURCE_COLOURS[place % len(SOURCE_COLOURS)]
        axes.plot(steps, values, color=colour, linewidth=1.2, label=name)
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _needle_sections(needles: Sequence[Measured[NeedleReport]]) -> list[Section]:
    if not needles:
        return []
    sections = []
    training = [item for item in needles if item.is_of_training]
    others = [item for item in needles if not item.is_of_training]
    if len(training) > 1:
        history = Section("Needle over tokens trained")
        figure = needle_history_figure([(item.label, item.report.results) for item in training])
        history.add_figure("needle heatmaps over tokens trained", figure)
        sections.append(history)
    for title, items in (("Needle", training), ("Needle of another model", others)):
        sections += [_needle_section(title, item) for item in items[-1:]]
    return sections


def _needle_section(title: str, item: Measured[NeedleReport]) -> Section:
    section = Section(title, f"{item.path} ({item.label})")
    section.plain = format_summary(item.report)
    section.add_figure(
        "needle heatmap",
        heatmap_figure(
            item.report.results,
            title="Needle in a haystack",
            training_length=item.report.settings.training_length,
            num_cells=item.report.settings.num_cells,
        ),
    )
    return section


def _loss_sections(losses: Sequence[Measured[LossReport]]) -> list[Section]:
    """One section for each set of reports that can be compared, that of the last report first."""
    groups: list[list[Measured[LossReport]]] = []
    for item in reversed(losses):
        for group in groups:
            if difference_between(group[-1].report, item.report) is None:
                group.insert(0, item)
                break
        else:
            groups.append([item])
    title = "Loss by source and position"
    titles = [title, *(f"{title}: other documents {number}" for number in range(1, len(groups)))]
    return [_loss_section(name, group) for name, group in zip(titles, groups, strict=False)]


def _loss_section(title: str, comparable: Sequence[Measured[LossReport]]) -> Section:
    first, last = comparable[0], comparable[-1]
    names = "; ".join(_name(item) for item in comparable)
    documents = f"{last.report.settings.dataset}, {last.report.settings.context_length} tokens"
    section = Section(title, f"On the same held-out documents ({documents}): {names}.")
    table = build_table([(_name(item), item.report) for item in comparable])
    section.rows = _table_rows(table)
    section.add_figure(
        "loss by source and bucket, and differences to the first", table_figure(table)
    )
    curves = position_figure(
        last.report.loss,
        first.report.loss if len(comparable) > 1 else None,
        title=f"Loss by position in the document, {last.label}",
        training_length=last.report.settings.training_length,
    )
    section.add_figure("loss by position", curves)
    return section


def _name(item: Measured[Any]) -> str:
    return item.label if item.tokens is not None else f"{item.path.stem}, {item.label}"


def _table_rows(table: LossTable) -> list[list[str]]:
    """The losses themselves; the figure next to shows the differences."""
    rows = [["positions (tokens)", "model", *table.sources]]
    for bucket, (start, stop) in enumerate(table.buckets):
        for report, name in enumerate(table.names):
            losses = table.losses[bucket][report]
            cells = ["-" if np.isnan(loss) else f"{loss:.4f}" for loss in losses]
            rows.append([f"{start}-{stop}", name, *cells])
    return rows


def _ruler_sections(rulers: Sequence[Measured[RulerReport]]) -> list[Section]:
    """Averages of all reports, and the tasks of the last."""
    if not rulers:
        return []
    section = Section(
        "RULER",
        "Average score of the tasks in percent, with 95% intervals by bootstrap over samples.",
        *(f"{_name(item)} ({item.path}): {effective_length(item.report)}." for item in rulers),
    )
    lengths = sorted({length for item in rulers for length in item.report.lengths})
    section.rows = [["model", "tasks", *map(str, lengths)]]
    for item in rulers:
        averages = [str(item.report.averages.get(length, "-")) for length in lengths]
        section.rows.append([_name(item), str(len(item.report.tasks)), *averages])
    figure = ruler_figure([(_name(item), item.report.averages) for item in rulers])
    section.add_figure("RULER average by context length", figure)
    last = rulers[-1]
    tasks = Section("RULER by task", f"{_name(last)} ({last.path})", *notes(last.report))
    tasks.rows = table_rows(last.report)
    return [section, tasks]
