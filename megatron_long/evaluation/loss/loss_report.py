"""Loss by position as a file and as a table.

The JSON holds the sums themselves, so that any later comparison or plot is exact.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_long.differences import differences
from megatron_long.errors import ConfigError
from megatron_long.evaluation.loss.position_loss import Bucket, PositionLoss
from megatron_long.files import atomic_path

FORMAT_VERSION = 1

SIGNIFICANT_NATS = 0.01
"""A difference above this counts. Source: Fu et al. 2024, arXiv 2402.10171, section 5."""

ALL_SOURCES = "all"

TokenCounts = Mapping[str, Sequence[int]]
"""Tokens by source, bucket by bucket."""


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What was measured, so that two reports can be compared, or refused."""

    checkpoint: str
    iteration: str
    """Training iteration of the checkpoint, or "release"."""
    dataset: str
    dataset_fingerprint: str
    context_length: int
    """Tokens taken of each document."""
    buckets: tuple[Bucket, ...]
    min_document_tokens: int
    max_documents_per_source: int | None
    training_length: int | None
    """Context the checkpoint was trained at, tokens, if said."""
    megatron_argv: tuple[str, ...]
    weights: str = "model"
    """Which of the checkpoint's weights: `main` is the optimizer's copy, before FP8 rounded it."""


@dataclass(frozen=True)
class LossReport:
    """One measurement."""

    settings: LossSettings
    loss: PositionLoss


def write_loss_report(path: Path, report: LossReport) -> None:
    """Write a report as JSON, whole or not at all."""
    loss = report.loss
    content = {
        "format_version": FORMAT_VERSION,
        "kind": "loss_by_position",
        "units": {"loss": "nats per token", "edges": "tokens from the start of the document"},
        "settings": asdict(report.settings),
        "edges": loss.edges,
        "sources": {
            source: {
                "num_documents": loss.num_documents[source],
                "mean_loss": _bucket_means(loss, report.settings.buckets, source),
                "loss_sums": loss.loss_sums[source].tolist(),
                "token_counts": [int(count) for count in loss.token_counts[source]],
            }
            for source in loss.loss_sums
        },
        ALL_SOURCES: {"mean_loss": _bucket_means(loss, report.settings.buckets, None)},
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_loss_report(path: Path, flag: str = "--compare") -> LossReport:
    """Read what `write_loss_report` wrote.

    Raises: ConfigError: missing, or not such a report.
    """
    if not path.is_file():
        raise ConfigError(f"{flag} {path} is not a file; give a JSON written by evaluate_loss.py")
    try:
        content = json.loads(path.read_text())
        settings = content["settings"]
        settings["buckets"] = tuple((start, stop) for start, stop in settings["buckets"])
        settings["megatron_argv"] = tuple(settings["megatron_argv"])
        loss = PositionLoss(tuple(content["edges"]))
        for source, part in content["sources"].items():
            loss.loss_sums[source] = np.array(part["loss_sums"], dtype=np.float64)
            loss.token_counts[source] = np.array(part["token_counts"], dtype=np.float64)
            loss.num_documents[source] = part["num_documents"]
        return LossReport(LossSettings(**settings), loss)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{flag} {path} is not a loss report of this version ({error!r}); give a JSON written "
            "by evaluate_loss.py"
        ) from error


def check_comparable(
    settings: LossSettings, counts: TokenCounts, other: LossReport, path: Path
) -> None:
    """Check that another report measured the same documents in the same buckets.

    Args:
        counts: Tokens by source in each of the settings' buckets.
    Raises: ConfigError: it did not.
    """
    difference = find_difference(settings, counts, other)
    if difference is not None:
        raise ConfigError(f"--compare {path} {difference}")


def find_difference(settings: LossSettings, counts: TokenCounts, other: LossReport) -> str | None:
    """Say why another report cannot be compared, and what to do; None if it can."""
    rules = {
        "dataset_fingerprint": "--dataset or --text (by its hash, for --text with --context-length)",
        "min_document_tokens": "--min-document-tokens",
        "max_documents_per_source": "--max-documents-per-source",
    }
    remedy = "only losses on the same documents can be compared, so repeat one of the two"
    found = differences(vars(other.settings), vars(settings), rules)
    if found:
        first = found[0]
        return f"was made with another {rules[first.name]}: {first.before} there, {first.now} here; {remedy}"
    missing = {edge for bucket in settings.buckets for edge in bucket} - set(other.loss.edges)
    if missing:
        return (
            f"has no position edges {sorted(missing)}; measure it again with the same --context-length "
            "and --buckets"
        )
    there = other.loss.bucket_counts(settings.buckets)
    nothing = (0,) * len(settings.buckets)
    for source in dict.fromkeys([*counts, *there]):
        pairs = zip(there.get(source, nothing), counts.get(source, nothing), strict=True)
        for bucket, (theirs, ours) in zip(settings.buckets, pairs, strict=True):
            if theirs != ours:
                return (
                    f"holds other tokens: {theirs} of {source} at positions {format_bucket(bucket)} "
                    f"there, {ours} here; {remedy}"
                )
    return None


def difference_between(report: LossReport, other: LossReport) -> str | None:
    """Say why another report cannot be compared with this one; None if it can."""
    buckets = report.settings.buckets
    return find_difference(report.settings, report.loss.bucket_counts(buckets), other)


def format_table(report: LossReport) -> str:
    """Give the mean losses as text: a row a source, a column a bucket."""
    buckets = report.settings.buckets
    names: list[str | None] = [*report.loss.loss_sums, None]
    header = ["source", "documents", *(f"{format_bucket(bucket)}" for bucket in buckets)]
    rows = [header]
    for name in names:
        documents = report.loss.num_documents
        count = documents[name] if name else sum(documents.values())
        means = [report.loss.mean(*bucket, name) for bucket in buckets]
        cells = ["-" if math.isnan(mean) else f"{mean:.4f}" for mean in means]
        rows.append([name or ALL_SOURCES, str(count), *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines.insert(0, "Loss in nats per token, by position in the document (tokens)")
    return "\n".join(lines)


def format_tokens(num_tokens: int) -> str:
    """Write a number of tokens short.

    >>> format_tokens(131072), format_tokens(256), format_tokens(1500)
    ('128K', '256', '1500')
    """
    return f"{num_tokens // 1024}K" if num_tokens and num_tokens % 1024 == 0 else str(num_tokens)


def format_bucket(bucket: Bucket) -> str:
    """Write a bucket the way table 5 does.

    >>> format_bucket((4096, 131072))
    '4K-128K'
    """
    return "-".join(map(format_tokens, bucket))


def _bucket_means(
    loss: PositionLoss, buckets: Sequence[Bucket], source: str | None
) -> dict[str, float | None]:
    means = {f"{start}-{stop}": loss.mean(start, stop, source) for start, stop in buckets}
    return {name: None if math.isnan(mean) else mean for name, mean in means.items()}
