"""The command and training ask for the same needles by their own flags; a stopped run resumes."""

import json
from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path

import pytest

from megatron_long.commands.evaluate_loss import build_parser as loss_parser
from megatron_long.commands.evaluate_needle import build_parser as needle_parser
from megatron_long.evaluation.live_evaluation import EvaluationArguments
from megatron_long.evaluation.loss.loss_run import LossRequest
from megatron_long.evaluation.models import MeasuredModel
from megatron_long.evaluation.needle.needle_run import (
    CELLS,
    NeedlePlan,
    NeedleRequest,
    plan_needles,
    resumed,
    run_needles,
)

from .fakes import FakeScorer, WordTokenizer, copy_predictions, make_story

LENGTH = 600
MODEL = MeasuredModel(path="model")


def training_flags(**flags: object) -> Namespace:
    own = {field.name: field.default for field in fields(EvaluationArguments)}
    return Namespace(**(own | {"seq_length": LENGTH} | flags))


def plan_of(request: NeedleRequest) -> NeedlePlan:
    return plan_needles(request, MODEL, make_story(400), WordTokenizer())


def request() -> NeedleRequest:
    grid = {"needle_num_lengths": 3, "needle_num_depths": 2, "needle_min_length": 300}
    return NeedleRequest.of_training(training_flags(needle_haystack="story.txt", **grid))


def test_training_asks_as_the_command_does():
    words = ["--haystack", "story.txt", "--context-length", str(LENGTH), "--num-lengths", "3"]
    words += ["--num-depths", "2", "--min-length", "300"]
    args = needle_parser().parse_args([*words, "--output-dir", "out"])
    assert NeedleRequest.of_command(args) == request()
    words = ["--dataset", "data", "--context-length", str(LENGTH), "--output", "loss.json"]
    args = loss_parser().parse_args([*words, "--max-documents-per-source", "16"])
    assert LossRequest.of_command(args) == LossRequest.of_training(training_flags(), "data")


def test_a_run_without_a_folder_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    report = run_needles(plan_of(request()), FakeScorer(copy_predictions, LENGTH))
    assert len(report.results) == 6
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_is_not_scored_again(tmp_path: Path):
    plan, scored = plan_of(request()), []
    part = replace(plan, cases=plan.cases[:2])
    run_needles(part, FakeScorer(copy_predictions, LENGTH), folder=tmp_path)
    assert len((tmp_path / CELLS).read_text().splitlines()) == 1 + 2
    with resumed(plan, tmp_path, force=False) as rest:
        scorer = FakeScorer(copy_predictions, LENGTH)
        report = run_needles(rest, scorer, folder=tmp_path, on_scored=scored.append)
    assert sum(scored) == sum(rows for rows, _ in scorer.shapes) == 4
    assert [result.key for result in report.results] == [case.key for case in plan.cases]
    kept = [json.loads(line) for line in (tmp_path / CELLS).read_text().splitlines()[1:]]
    assert sorted(map(repr, kept)) == sorted(repr(vars(result)) for result in report.results)
