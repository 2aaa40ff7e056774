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
from megatron_long.dataset.tables import add_sources, plot_sources, share_text

REPORT_FOLDER = "report"
FIGURE_FILE = "lengths_and_sources.png"
PAGE_FILE = "index.html"
MAX_INPUTS = 500
"""Input files listed; a corpus may have 59,166."""
WORDS = {
    "train_tokens": "training tokens asked (--train-tokens)",
    "strategy": "strategy (--strategy)",
    "short_keep_ratio": "probability of keeping a short document (--short-keep-ratio)",
    "long_token_share": "share of tokens in long documents asked of each source (--long-token-share)",
    "long_threshold_tokens": "tokens from which a document is long (--long-threshold)",
    "cut_length_tokens": "tokens of a piece, if documents are cut (--cut-length)",
    "upsampled_shares": "share asked with upsample-sources",
    "source_shares": "shares of the sources (--source-shares)",
    "missing_sources": "sources with a share that the corpus lacks (--missing-sources)",
    "valid_tokens_per_source": "tokens to hold out of each source (--valid-tokens-per-source)",
    "short_share": "share of tokens in documents as they are (--short-share)",
    "allow_repeat": "times a document may be used (--allow-repeat)",
    "kind": "kind of vocabulary",
    "vocab_size": "ids in the vocabulary",
    "bos_id": "id before each document (BOS)",
    "eod_id": "id after each document (EOD)",
    "vocabulary_sha256": "SHA-256 of the vocabulary",
    "dtype": "type of a token",
    "format_version": "version of the format",
    "order": "order of the training set",
    "window_tokens": "tokens of a window",
    "num_windows": "windows",
    "mean_deviation": "mean deviation of a source's share in a window",
    "largest_deviation": "largest deviation of a source's share in a window",
    "documents_empty": "documents without a token",
    "documents_bad": "documents that could not be read",
    "made_by": "tokens made by",
    "engine_version": "version",
    "engine_notes": "notes",
}
"""Fields of the manifest in words."""
TEMPLATE = """\
{% macro show(table) %}
<div class="scroll"><table{% if not table.header %} class="pairs"{% endif %}>\
{% if table.header %}<thead><tr>\
{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr></thead>{% endif %}<tbody>
{% for row in table.rows %}\
<tr{% if table.ends_with_total and loop.last %} class="total"{% endif %}>\
{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{{ name }}: dataset</title><style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; }
.scroll { overflow-x: auto; } img { max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .5em; text-align: right; vertical-align: top; }
td { white-space: nowrap; } th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere;
                                 min-width: 7em; }
table.pairs td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
thead th { border-bottom: 1px solid #888; } tbody tr:nth-child(even) { background: #f4f4f4; }
tr.total { font-weight: bold; border-top: 1px solid #888; }
code { font-size: .9em; overflow-wrap: anywhere; } .conclusion { font-size: 1.2em; } .note { color: #666; }
</style></head>
<body>
<h1>Dataset {{ name }}</h1>
<p class="conclusion">{{ conclusion }}</p>
<p>{{ count(manifest.train.num_tokens) }} training tokens in \
{{ count(manifest.train.num_documents) }} documents from {{ count(manifest.sources | length) }} \
source{{ "s" if manifest.sources | length != 1 }}; strategy <code>{{ manifest.mixture.strategy }}</code>\
{% if plain %} with {{ count(plain) }} tokens in documents as they are{% endif %}, \
seed {{ manifest.seed }}; fingerprint <code>{{ manifest.fingerprint }}</code>.</p>
{% if manifest.warnings %}
<ul>{% for warning in manifest.warnings %}<li>{{ warning }}</li>{% endfor %}</ul>
{% endif %}
<img alt="Token shares by document length and by source" src="data:image/png;base64,{{ figure }}">
{% if estimate %}<p class="note">{{ estimate }} In the figure, the corpus is estimated as well.</p>{% endif %}
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


def write_report(folder: Path, manifest: Manifest, name: str) -> None:
    """Write the figure as PNG, and the page.

    Args:
        folder: Where to write; created if missing.
        name: Of the dataset, as its user knows it.
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
    page = report_page(manifest, name, buffer.getvalue())
    (folder / PAGE_FILE).write_text(page, encoding="utf-8")


def report_page(manifest: Manifest, name: str, figure_png: bytes) -> str:
    """Return the page as one HTML text."""
    import jinja2

    tokenizer = dataclasses.asdict(manifest.tokenizer) | {"dtype": manifest.dtype}
    sources = manifest.sources
    tables = {
        "Sources": _sources_table(sources),
        "Share of tokens in long documents": _lengths_table(sources),
        "Sources in detail": _details_table(sources),
        "Mixture": _pairs_table(manifest.mixture),
        "Tokenizer": _pairs_table(tokenizer),
        "Making": _pairs_table(_other_fields(manifest)),
        "Documents left out": _bad_table(manifest.bad_documents[:MAX_INPUTS]),
        "Files": _files_table(manifest),
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE).render(
        name=name,
        conclusion=conclude(manifest),
        estimate=_estimate_note(sources),
        manifest=manifest,
        figure=base64.b64encode(figure_png).decode("ascii"),
        tables=tables,
        inputs=_inputs_table(manifest.inputs[:MAX_INPUTS]),
        most=MAX_INPUTS,
        plain=sum(info.tokens_plain for info in sources.values()),
        count="{:,}".format,
    )


def conclude(manifest: Manifest) -> str:
    """Say in one sentence what became of long documents and of the shares of the sources."""
    total = add_sources(manifest.sources)
    before = _about(not total.tokens_in_is_exact, f"{total.long_share_before:.1%}")
    threshold = manifest.mixture["long_threshold_tokens"]
    after = f"{total.long_share_after:.1%} of the tokens"
    sentence = f"Long documents ({threshold:,} tokens and more): {before} → {after}"
    if len(manifest.sources) < 2:
        return f"{sentence}."
    tokens = max(total.tokens_in, 1)
    changes = {
        name: info.share_got - info.tokens_in / tokens for name, info in manifest.sources.items()
    }
    most = max(changes, key=lambda name: abs(changes[name]))
    for bound in (0.001, 0.01):
        if abs(changes[most]) <= bound:
            within = _about(not total.tokens_in_is_exact, str(bound))
            return f"{sentence}, shares of the sources unchanged within {within}."
    info = manifest.sources[most]
    share = _about(not total.tokens_in_is_exact, f"{info.tokens_in / tokens:.1%}")
    return (
        f"{sentence}; share of {most}: {share} → {info.share_got:.1%}, other sources change less."
    )


def _about(is_estimate: bool, text: str) -> str:
    return f"≈ {text}" if is_estimate else text


def _estimate_note(sources: Mapping[str, SourceInfo]) -> str:
    """Say what ≈ means, or nothing if all is exact."""
    total = add_sources(sources)
    if total.tokens_in_is_exact:
        return ""
    return (
        f"≈ marks estimates: {total.documents_tokenized:,} of {total.documents_in:,} documents were "
        "tokenized, and the tokens of the others are estimated from them; ± is the bound of the error in 95 "
        "of 100 cases. All other figures are exact."
    )


def _count_text(count: int, error: int) -> str:
    return f"{count:,}" + (f" ±{error:,}" if error else "")


def _sources_table(sources: Mapping[str, SourceInfo]) -> PageTable:
    """Build the table of a row for each source; the last row is the total."""
    header = (
        *("source", "documents in the corpus", "tokens in the corpus", "share of the corpus"),
        *("share asked", "share in training", "long before", "long after"),
        *("training documents", "training tokens", "held-out tokens"),
    )
    total = add_sources(sources)
    rows = []
    for name, info in [*sources.items(), ("all", total)]:
        rough = not info.tokens_in_is_exact
        rows.append(
            [
                name,
                f"{info.documents_in:,}",
                _about(rough, _count_text(info.tokens_in, info.tokens_in_error)),
                _about(
                    not total.tokens_in_is_exact and info is not total,
                    share_text(info.tokens_in / max(total.tokens_in, 1), info.share_in_error),
                ),
                f"{info.share_asked:.2%}",
                f"{info.share_got:.2%}",
                _about(rough, share_text(info.long_share_before, info.long_share_before_error)),
                f"{info.long_share_after:.2%}",
                f"{info.documents_kept:,}",
                f"{info.tokens_kept:,}",
                f"{info.tokens_valid:,}",
            ]
        )
    return PageTable(header, rows, ends_with_total=True)


def _details_table(sources: Mapping[str, SourceInfo]) -> PageTable:
    """Build the table of what is left to tell of each source."""
    has_plain = any(info.tokens_plain for info in sources.values())
    rows = [
        [
            name,
            f"{info.bytes_in:,}",
            f"{info.documents_tokenized:,}",
            f"{info.tokens_tokenized:,}",
            f"{info.documents_valid:,}",
            f"{info.documents_dropped:,}",
            _about(not info.tokens_in_is_exact, f"{info.tokens_dropped:,}"),
            f"{info.short_keep_ratio:.4g}",
            f"{info.passes:,}",
            f"{info.documents_repeated:,}",
            f"{info.tokens_repeated:,}",
            *((f"{info.documents_plain:,}", f"{info.tokens_plain:,}") if has_plain else ()),
        ]
        for name, info in sources.items()
    ]
    header = (
        *("source", "bytes of text", "documents tokenized", "tokens made", "held-out documents"),
        *("documents not used", "tokens not used", "probability of keeping a short document"),
        *("passes", "documents used again", "tokens used again"),
        *(("documents as they are", "tokens as they are") if has_plain else ()),
    )
    return PageTable(header, rows)


def _lengths_table(sources: Mapping[str, SourceInfo]) -> PageTable:
    labels = [f"≥ {step // 1024}K" for step in LENGTH_STEPS]
    times = ("in the corpus", "in training")
    header = ["source", *(f"{label} {time}" for label in labels for time in times)]
    cells = []
    for name, info in [*sources.items(), ("all", add_sources(sources))]:
        row = [name]
        for step in LENGTH_STEPS:
            before = f"{share_at_least(info.tokens_by_length_before, step):.2%}"
            row.append(_about(not info.tokens_in_is_exact, before))
            row.append(f"{share_at_least(info.tokens_by_length_after, step):.2%}")
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
    names = ("format_version", "order", "documents_empty", "documents_bad", "made_by")
    content = dataclasses.asdict(manifest)
    if manifest.order and not manifest.order.num_windows:
        window = manifest.order.window_tokens
        content["order"] = f"not measured: the set is smaller than a window of {window:,} tokens"
    return {name: content[name] for name in names if content[name] not in (None, {}, 0)}


def _bad_table(bad: Sequence[Mapping[str, Any]]) -> PageTable:
    header = ["file", "line", "reason"]
    return PageTable(header, [[str(item[name]) for name in header] for item in bad])


def _inputs_table(inputs: Sequence[InputInfo]) -> PageTable:
    rows = [
        [
            item.name,
            f"{item.size_bytes:,}",
            f"{item.num_documents:,}",
            f"{item.num_bad:,}",
            item.xxh3_128,
        ]
        for item in inputs
    ]
    return PageTable(["file", "bytes", "documents", "documents left out", "xxh3_128"], rows)


def _pairs_table(pairs: Mapping[str, Any]) -> PageTable:
    """Build a table of names and values, without a header."""
    cells: list[list[str]] = []
    for name, value in pairs.items():
        words = WORDS.get(name, name.replace("_", " "))
        if isinstance(value, dict):
            cells += [
                [f"{words}: {WORDS.get(key, key.replace('_', ' '))}", _value(key, item)]
                for key, item in value.items()
            ]
        else:
            cells.append([words, _value(name, value)])
    return PageTable([], cells)


def _value(name: str, value: Any) -> str:
    """Write a value; shares and deviations of shares as percentages."""
    if value is None:
        return "none"
    if isinstance(value, float) and ("share" in name or "deviation" in name):
        return f"{value:.2%}"
    if isinstance(value, int) and not isinstance(value, bool) and not name.endswith("_id"):
        return f"{value:,}"
    return str(value)
