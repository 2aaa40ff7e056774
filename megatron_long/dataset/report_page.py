"""The report of a dataset: the figure of lengths and sources, and one HTML page with all tables.

The page holds its figure and its style, so it can be mailed and opened without a network.
"""

import base64
import dataclasses
import html
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_long.dataset.manifest import LENGTH_STEPS, Manifest, SourceInfo, share_at_least
from megatron_long.dataset.tables import add_sources, plot_sources

REPORT_FOLDER = "report"
FIGURE_FILE = "lengths_and_sources.png"
PAGE_FILE = "index.html"
MAX_INPUTS = 500
"""Input files listed; a corpus may have 59,166."""
STYLE = """
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
"""


def write_report(folder: Path, manifest: Manifest) -> None:
    """Write the figure as PNG, and the page.

    Args:
        folder: Where to; made if missing.
    """
    figure = plot_sources(manifest.sources, manifest.mixture["long_threshold_tokens"])
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name is a box then
        # Without the version of matplotlib in the file: the same dataset gives the same bytes.
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FIGURE_FILE).write_bytes(buffer.getvalue())
    (folder / PAGE_FILE).write_text(report_page(manifest, buffer.getvalue()), encoding="utf-8")


def report_page(manifest: Manifest, figure_png: bytes) -> str:
    """Give the page as one HTML text."""
    encoded = base64.b64encode(figure_png).decode("ascii")
    mixture = manifest.mixture
    parts = [
        "<h1>Dataset</h1>",
        f"<p>{manifest.train.num_tokens:,} training tokens in {manifest.train.num_documents:,} "
        f"documents; strategy <code>{_text(mixture['strategy'])}</code>, seed {manifest.seed}; "
        f"fingerprint <code>{manifest.fingerprint}</code>.</p>",
        f'<img alt="Token shares by document length and by source" src="data:image/png;base64,{encoded}">',
        "<h2>Sources</h2>",
        _sources_table(manifest.sources),
        "<h2>Share of tokens in long documents</h2>",
        _lengths_table(manifest.sources),
        "<h2>Mixture</h2>",
        _pairs_table(mixture),
        "<h2>Tokenizer</h2>",
        _pairs_table(dataclasses.asdict(manifest.tokenizer) | {"dtype": manifest.dtype}),
        *_other_parts(manifest),
        "<h2>Files</h2>",
        _files_table(manifest),
        f"<h2>Corpus</h2><p>{len(manifest.inputs):,} files, "
        f"{sum(item.size_bytes for item in manifest.inputs):,} bytes"
        + (f"; the first {MAX_INPUTS} are listed" if len(manifest.inputs) > MAX_INPUTS else "")
        + ".</p>",
        _records_table([dataclasses.asdict(item) for item in manifest.inputs[:MAX_INPUTS]]),
    ]
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Dataset '
        f"{manifest.fingerprint[:16]}</title><style>{STYLE}</style></head>\n<body>\n{body}\n"
        "</body></html>\n"
    )


def _sources_table(sources: Mapping[str, SourceInfo]) -> str:
    """Make a column a source, and a row a number; the last column adds them up."""
    columns = [dataclasses.asdict(info) for info in [*sources.values(), add_sources(sources)]]
    rows = []
    for field in dataclasses.fields(SourceInfo):
        values = [column[field.name] for column in columns]
        if field.name != "index" and not isinstance(values[0], list | dict):
            cells = [_number(field.name, value) for value in values]
            rows.append([field.name.replace("_", " "), *cells])
    return _table(["", *sources, "all"], rows)


def _lengths_table(sources: Mapping[str, SourceInfo]) -> str:
    labels = [f"≥ {step // 1024}K" for step in LENGTH_STEPS]
    header = ["source", *(f"{label} {when}" for label in labels for when in ("before", "after"))]
    cells = []
    for name, info in [*sources.items(), ("all", add_sources(sources))]:
        row = [name]
        for step in LENGTH_STEPS:
            for tokens in (info.tokens_by_length_before, info.tokens_by_length_after):
                row.append(f"{100 * share_at_least(tokens, step):.2f}%")
        cells.append(row)
    return _table(header, cells, total=True)


def _files_table(manifest: Manifest) -> str:
    cells = []
    for name, split in {"train": manifest.train, **manifest.valid}.items():
        for file, info in split.files.items():
            numbers = [f"{split.num_documents:,}", f"{split.num_tokens:,}", f"{info.size_bytes:,}"]
            cells.append([file, name, *numbers, info.xxh3_128])
    return _table(["file", "split", "documents", "tokens", "bytes", "xxh3_128"], cells)


def _other_parts(manifest: Manifest) -> Iterable[str]:
    """Show fields of the manifest that have no table of their own."""
    known = {"seed", "mixture", "tokenizer", "dtype", "train", "valid", "sources", "inputs"}
    known.add("tokenizer_files")
    rest = {
        name: value
        for name, value in dataclasses.asdict(manifest).items()
        if name not in known and value not in (None, [], {}, ())
    }
    return ["<h2>Making</h2>", _pairs_table(rest)] if rest else []


def _records_table(records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return ""
    header = list(records[0])
    rows = [[_number(key, record[key]) for key in header] for record in records]
    return _table([key.replace("_", " ") for key in header], rows)


def _pairs_table(pairs: Mapping[str, Any]) -> str:
    cells: list[list[str]] = []
    for name, value in pairs.items():
        if isinstance(value, dict):
            cells += [[f"{name}.{key}", _number(key, item)] for key, item in value.items()]
        else:
            cells.append([name, _number(name, value)])
    return _table(["", ""], [[name.replace("_", " "), value] for name, value in cells])


def _number(name: str, value: Any) -> str:
    """Write a value; shares, which have it in their names, as percentages."""
    if isinstance(value, float) and "share" in name:
        return f"{100 * value:.2f}%"
    if isinstance(value, int) and not isinstance(value, bool) and not name.endswith("_id"):
        return f"{value:,}"
    return "; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, total: bool = False) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    lines = []
    for number, row in enumerate(rows, 1):
        mark = ' class="total"' if total and number == len(rows) else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _text(value: object) -> str:
    return html.escape(str(value))
