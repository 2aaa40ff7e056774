import json
from pathlib import Path

import pytest

from megatron_long.errors import ConfigError
from megatron_long.evaluation.needle.needle_report import (
    NeedleReport,
    NeedleSettings,
    format_summary,
    read_needle_report,
    spread_depths,
    spread_lengths,
    summarize,
    write_needle_report,
)
from megatron_long.evaluation.needle.needle_scores import NeedleResult


def make_report(training_length: int | None) -> NeedleReport:
    """Give a model that finds the needle up to 1000 tokens, in the first half only."""
    lengths, depths = (500, 1000, 1500, 2000), (0.0, 0.5, 1.0)
    results = [
        NeedleResult(
            context_length=length,
            depth=depth,
            actual_depth=depth * 0.99,
            needle_start=int(depth * length),
            is_exact=length <= 1000 and depth < 1,
            token_accuracy=1.0 if length <= 1000 and depth < 1 else 0.25,
            log_likelihood=-0.1 if length <= 1000 and depth < 1 else -3.0,
        )
        for length in lengths
        for depth in depths
    ]
    settings = NeedleSettings(
        model="ckpt",
        backend="megatron",
        iteration="release",
        precision=None,
        haystack_sha256="f00",
        vocabulary_sha256="abc",
        prompt="paper",
        tasks={"sentence": "The needle."},
        context_lengths=lengths,
        depths=depths,
        training_length=training_length,
    )
    return NeedleReport(settings, results)


def test_json_round_trip(tmp_path: Path):
    report = make_report(1000)
    write_needle_report(tmp_path / "needle.json", report)
    assert read_needle_report(tmp_path / "needle.json") == report
    content = json.loads((tmp_path / "needle.json").read_text())
    assert content["means"]["within"]["exact_match"] == pytest.approx(4 / 6)
    assert len(content["cells"]) == 12


def test_means_within_and_beyond_the_training_length():
    means = summarize(make_report(1000).results, 1000)
    assert means["within"]["num_cells"] == means["beyond"]["num_cells"] == 6
    assert means["within"]["exact_match"] == pytest.approx(4 / 6)
    assert means["beyond"] == {
        "num_cells": 6, "exact_match": 0.0, "token_accuracy": 0.25, "log_likelihood": -3.0,
    }  # fmt: skip
    assert means["all"]["exact_match"] == pytest.approx(4 / 12)
    assert set(summarize(make_report(None).results, None)) == {"all"}
    assert set(summarize(make_report(1).results, 5000)) == {"all", "within"}


def test_summary_text():
    lines = format_summary(make_report(1000)).splitlines()
    assert lines[2].split() == ["up", "to", "1000", "6", "66.7%", "75.0%", "-1.067"]
    assert lines[3].split() == ["beyond", "1000", "6", "0.0%", "25.0%", "-3.000"]


def test_grids():
    assert spread_lengths(100, 400, 4) == (100, 200, 300, 400)
    assert len(spread_lengths(None, 131072, 40)) == 40
    assert spread_lengths(5, 7, 40) == (5, 6, 7)
    assert spread_depths(5) == (0.0, 0.25, 0.5, 0.75, 1.0)
    with pytest.raises(ConfigError, match="--min-length 500 is above --context-length 400"):
        spread_lengths(500, 400, 4)


def test_files_that_are_no_reports(tmp_path: Path):
    with pytest.raises(ConfigError, match="is not a file"):
        read_needle_report(tmp_path / "none.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a needle report"):
        read_needle_report(tmp_path / "other.json")
