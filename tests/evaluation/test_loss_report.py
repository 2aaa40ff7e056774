import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_long.errors import ConfigError
from megatron_long.evaluation.loss.loss_report import (
    LossReport,
    LossSettings,
    check_comparable,
    format_table,
    read_loss_report,
    write_loss_report,
)
from megatron_long.evaluation.loss.position_loss import PositionLoss, cell_edges

SETTINGS = LossSettings(
    checkpoint="ckpt",
    iteration="10",
    dataset="data",
    dataset_fingerprint="f00",
    context_length=16,
    buckets=((0, 4), (4, 16)),
    min_document_tokens=2,
    max_documents_per_source=None,
    training_length=4,
    megatron_argv=("--context-parallel-size", "2"),
)


COUNTS = {"Book": (4, 12), "C4": (3, 0)}


def make_report(late_loss: float) -> LossReport:
    loss = PositionLoss(cell_edges(16, SETTINGS.buckets))
    losses = np.array([2.0] * 4 + [late_loss] * 12)
    loss.add("Book", losses, np.ones(16))
    loss.add("C4", losses[:3] + 1, np.ones(3))
    return LossReport(SETTINGS, loss)


def test_json_round_trip(tmp_path: Path):
    report = make_report(1.2345678901234567)
    write_loss_report(tmp_path / "loss.json", report)
    again = read_loss_report(tmp_path / "loss.json")
    assert again.settings == report.settings
    assert again.loss.edges == report.loss.edges
    assert again.loss.num_documents == report.loss.num_documents
    for source, sums in report.loss.loss_sums.items():
        assert again.loss.loss_sums[source].tolist() == sums.tolist()
        assert again.loss.token_counts[source].tolist() == report.loss.token_counts[source].tolist()
    content = json.loads((tmp_path / "loss.json").read_text())
    assert content["sources"]["Book"]["mean_loss"]["0-4"] == 2.0
    assert content["sources"]["C4"]["mean_loss"] == {"0-4": 3.0, "4-16": None}
    assert content["all"]["mean_loss"]["0-4"] == pytest.approx((4 * 2 + 3 * 3) / 7)


def test_table():
    lines = format_table(make_report(1.5)).splitlines()
    assert lines[1].split() == ["source", "documents", "0-4", "4-16"]
    assert lines[3].split() == ["Book", "1", "2.0000", "1.5000"]
    assert lines[4].split() == ["C4", "1", "3.0000", "-"]
    assert lines[5].split() == ["all", "2", "2.4286", "1.5000"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_fingerprint": "other"}, "--dataset"),
        ({"min_document_tokens": 99}, "--min-document-tokens"),
        ({"max_documents_per_source": 1}, "--max-documents-per-source"),
        ({"buckets": ((0, 9), (9, 16))}, "--buckets"),
    ],
)
def test_only_the_same_documents_and_buckets_compare(change, message):
    check_comparable(SETTINGS, COUNTS, make_report(1.0), Path("old.json"))
    with pytest.raises(ConfigError, match=message):
        check_comparable(replace(SETTINGS, **change), COUNTS, make_report(1.0), Path("old.json"))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({**COUNTS, "Book": (4, 11)}, "12 of Book at positions 4-16 there, 11 here"),
        ({"Book": (4, 12)}, "3 of C4 at positions 0-4 there, 0 here"),
        ({**COUNTS, "Wiki": (1, 0)}, "0 of Wiki at positions 0-4 there, 1 here"),
    ],
)
def test_other_numbers_of_tokens_do_not_compare(counts, message):
    with pytest.raises(ConfigError, match=message):
        check_comparable(SETTINGS, counts, make_report(1.0), Path("old.json"))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"settings": {"buckets": []}}'])
def test_files_that_are_no_reports(tmp_path: Path, text):
    path = tmp_path / "other.json"
    with pytest.raises(ConfigError, match="is not a file"):
        read_loss_report(path)
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"--compare .*not a loss report"):
        read_loss_report(path)
