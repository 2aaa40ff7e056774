"""The report of a dataset: the figure of lengths and sources, and one HTML page with all tables.

The page holds its figure and its style, so it can be mailed and opened without a network.
"""

import base64
import dataclasses
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_long.dataset.manifest import (
    LENGTH_STEPS,
    InputInfo,
    Manifest,
    SourceInfo,
    share_at_least,
)
from megatron_long.dataset.tables import add_sources, plot_sources

REPORT_FOLDER = "report"
FIGURE_FILE = "lengths_and_sources.png"
PAGE_FILE = "index.html"
MAX_INPUTS = 500
"""Input files listed; a corpus may have 59,166."""
TEMPLATE = """\
{% macro show(table) %}
<div class="scroll"><table><thead><tr>\
{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{% for row in table.rows %}\
<tr{% if table.ends_with_total and loop.last %} class="total"{% endif %}>\
{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Dataset {{ manifest.fingerprint[:16] }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; }
.scroll { overflow-x: auto; } img { max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .7em; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1px solid #888; } tbody tr:nth-child(even) { background: #f4f4f4; }
tr.total { font-weight: bold; border-top: 1px solid #888; }
code { font-size: .9em; }
</style></head>
<body>
<h1>Dataset</h1>
<p>{{ count(manifest.train.num_tokens) }} training tokens in \
{{ count(manifest.train.num_documents) }} documents; \
strategy <code>{{ manifest.mixture.strategy }}</code>, seed {{ manifest.seed }}; \
fingerprint <code>{{ manifest.fingerprint }}</code>.</p>
<img alt="Token shares by document length and by source" src="data:image/png;base64,{{ figure }}">
{% for title, table in tables.items() if table.rows %}
<h2>{{ title }}</h2>
{{ show(table) -}}
{% endfor %}
<h2>Corpus</h2><p>{{ count(manifest.inputs | length) }} files, \
{{ count(manifest.inputs | sum("size_bytes")) }} bytes\
{% if manifest.inputs | length > most %}; the first {{ most }} are listed{% endif %}.</p>
{{ show(inputs) -}}
</body></html>
"""
"""Filled by Jinja2, which escapes text from files."""


@dataclass(frozen=True)
class PageTable:
    """A table of the page, as text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    ends_with_total: bool = False


def write_report(folder: Path, manifest: Manifest) -> None:
    """Write the figure as PNG, and the page.

    Args:
        folder: Where to write; created if missing.
    """
    figure = plot_sources(manifest.sources, manifest.mixture["long_threshold_tokens"])
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing from font"
        )  # such a name is drawn as boxes
        # Without the version of matplotlib in the file: the same dataset gives the same bytes.
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FIGURE_FILE).write_bytes(buffer.getvalue())
    (folder / PAGE_FILE).write_text(report_page(manifest, buffer.getvalue()), encoding="utf-8")


def report_page(manifest: Manifest, figure_png: bytes) -> str:
    """Return the page as one HTML text."""
    import jinja2

    tokenizer = dataclasses.asdict(manifest.tokenizer) | {"dtype": manifest.dtype}
    tables = {
        "Sources": _sources_table(manifest.sources),
        "Share of tokens in long documents": _lengths_table(manifest.sources),
        "Mixture": _pairs_table(manifest.mixture),
        "Tokenizer": _pairs_table(tokenizer),
        "Making": _pairs_table(_other_fields(manifest)),
        "Files": _files_table(manifest),
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE).render(
        manifest=manifest,
        figure=base64.b64encode(figure_png).decode("ascii"),
        tables=tables,
        inputs=_inputs_table(manifest.inputs[:MAX_INPUTS]),
        most=MAX_INPUTS,
        count="{:,}".format,
    )


def _sources_table(sources: Mapping[str, SourceInfo]) -> PageTable:
    """Build a table with a column for each source and a row for each number; the last column is the total."""
    columns = [dataclasses.asdict(info) for info in [*sources.values(), add_sources(sources)]]
    rows = []
    for field in dataclasses.fields(SourceInfo):
        values = [column[field.name] for column in columns]
        if field.name != "index" and not isinstance(values[0], list | dict):
            cells = [_number(field.name, value) for value in values]
            rows.append([field.name.replace("_", " "), *cells])
    return PageTable(["", *sources, "all"], rows)


def _lengths_table(sources: Mapping[str, SourceInfo]) -> PageTable:
    labels = [f"≥ {step // 1024}K" for step in LENGTH_STEPS]
    header = ["source", *(f"{label} {when}" for label in labels for when in ("before", "after"))]
    cells = []
    for name, info in [*sources.items(), ("all", add_sources(sources))]:
        row = [name]
        for step in LENGTH_STEPS:
            for tokens in (info.tokens_by_length_before, info.tokens_by_length_after):
                row.append(f"{100 * share_at_least(tokens, step):.2f}%")
        cells.append(row)
    return PageTable(header, cells, ends_with_total=True)


def _files_table(manifest: Manifest) -> PageTable:
    cells = []
    for name, split in {"train": manifest.train, **manifest.valid}.items():
        for file, info in split.files.items():
            numbers = [f"{split.num_documents:,}", f"{split.num_tokens:,}", f"{info.size_bytes:,}"]
            cells.append([file, name, *numbers, info.xxh3_128])
    return PageTable(["file", "split", "documents", "tokens", "bytes", "xxh3_128"], cells)


def _other_fields(manifest: Manifest) -> dict[str, Any]:
    """Return fields of the manifest that have no table of their own."""
    known = {"seed", "mixture", "tokenizer", "dtype", "train", "valid", "sources", "inputs"}
    known.add("tokenizer_files")
    return {
        name: value
        for name, value in dataclasses.asdict(manifest).items()
        if name not in known and value not in (None, [], {}, ())
    }


def _inputs_table(inputs: Sequence[InputInfo]) -> PageTable:
    names = [field.name for field in dataclasses.fields(InputInfo)]
    rows = [[_number(name, getattr(item, name)) for name in names] for item in inputs]
    return PageTable([name.replace("_", " ") for name in names], rows)


def _pairs_table(pairs: Mapping[str, Any]) -> PageTable:
    cells: list[list[str]] = []
    for name, value in pairs.items():
        if isinstance(value, dict):
            cells += [[f"{name}.{key}", _number(key, item)] for key, item in value.items()]
        else:
            cells.append([name, _number(name, value)])
    return PageTable(["", ""], [[name.replace("_", " "), value] for name, value in cells])


def _number(name: str, value: Any) -> str:
    """Write a value; shares, which have it in their names, as percentages."""
    if isinstance(value, float) and "share" in name:
        return f"{100 * value:.2f}%"
    if isinstance(value, int) and not isinstance(value, bool) and not name.endswith("_id"):
        return f"{value:,}"
    return "; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
