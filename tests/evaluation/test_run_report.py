"""The report of a run: everything found, ordered, in one page that needs no network."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_long.errors import ConfigError
from megatron_long.evaluation.loss.loss_report import LossReport, write_loss_report
from megatron_long.evaluation.needle.needle_report import NeedleReport, write_needle_report
from megatron_long.evaluation.report.run_files import collect
from megatron_long.evaluation.report.run_report import run_report_page, write_run_report
from tests import hostile

from .test_loss_report import make_report as make_loss
from .test_needle_report import make_report as make_needle

REPOSITORY = Path(__file__).resolve().parents[2]


def write_evaluation(folder: Path, iteration: int, late_loss: float) -> None:
    folder.mkdir(parents=True)
    needle, loss = make_needle(1000), make_loss(late_loss)
    settings = replace(needle.settings, iteration=str(iteration))
    write_needle_report(folder / "needle.json", NeedleReport(settings, needle.results))
    settings = replace(loss.settings, iteration=str(iteration))
    write_loss_report(folder / "loss.json", LossReport(settings, loss.loss))
    progress = {"iteration": iteration, "tokens": iteration * 1_000_000}
    (folder / "progress.json").write_text(json.dumps(progress))


def write_events(folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for step in range(1, 6):
            writer.add_scalar("lm loss", 5 - step / 2, step, walltime=100 + 2 * step)
            writer.add_scalar("batch-size", 4, step, walltime=100 + 2 * step)


@pytest.fixture
def run_dir(tmp_path: Path, tiny_dataset: Path) -> Path:
    folder = tmp_path / "ckpt"
    for iteration, loss in ((9, 1.6), (10, 1.5), (100, 1.2)):
        write_evaluation(folder / "evaluation" / f"iter_{iteration:07d}", iteration, loss)
    write_events(folder / "tensorboard")
    argv = ["--dataset", str(tiny_dataset), "--seq-length", "1000"]
    (folder / "run.json").write_text(json.dumps({"argv": argv}))
    same = [{"iteration": step, "lm loss": 5 - step / 2} for step in range(1, 6)]
    (folder / "same.jsonl").write_text("".join(json.dumps(line) + "\n" for line in same))
    other = [{"iteration": 1, "lm loss": 3.0}, {"iteration": 1, "lm loss": 2.5}]
    (folder / "other.jsonl").write_text("".join(json.dumps(line) + "\n" for line in other))
    (folder / "corpus.jsonl").write_text('{"text": "no log"}\n')
    return folder


def test_what_is_found(run_dir, tiny_dataset):
    found = collect(run_dir)
    assert found.dataset == tiny_dataset
    assert [curve.name for curve in found.curves] == ["other.jsonl", "tensorboard"]  # fewer steps
    log, board = found.curves
    assert board.losses == [4.5, 4.0, 3.5, 3.0, 2.5]
    assert board.tokens == [4000.0, 8000.0, 12_000.0, 16_000.0, 20_000.0]
    assert [step for step, _ in board.tokens_per_second] == [2, 3, 4, 5]
    assert [rate for _, rate in board.tokens_per_second] == pytest.approx([2000.0] * 4)
    assert not board.is_timed
    assert (log.steps, log.losses) == ([1], [2.5])  # a step done again after a restart
    assert [item.iteration for item in found.needles] == [9, 10, 100]
    assert [item.label for item in found.losses] == ["9M tokens", "10M tokens", "100M tokens"]
    assert found.left_out == []


def test_nothing_of_the_folder_is_run(run_dir, tiny_dataset):
    """Reports, events, logs, `cells.jsonl`, `run.json`, and the dataset that lies there."""
    shutil.copytree(tiny_dataset, run_dir / "data")
    (run_dir / "needle").mkdir()
    (run_dir / "needle" / "cells.jsonl").write_text("{}\n")
    assert hostile.plant_everywhere(run_dir, [lambda: collect(run_dir)]) >= 100


def test_the_page_holds_everything(run_dir):
    page = run_report_page(collect(run_dir))
    for title in ("Mixture", "Training loss", "Throughput", "Needle over tokens trained", "Needle"):
        assert f">{title}</h2>" in page
    assert "Loss by source and position" in page
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 7
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert "http" not in re.sub(r'"data:[^"]*"', "", page)
    assert "<td>1.2000</td>" in page
    assert "2,000" in page  # tokens a second


def write_curve(folder: Path, losses: list[float], *, first_step: int, started: float) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for place, loss in enumerate(losses):
            writer.add_scalar("lm loss", loss, first_step + place, walltime=started + place)


def test_losses_at_the_ends_are_means_and_runs_come_as_they_began(tmp_path):
    noise = [4.0, 2.0] * 15  # of every step; the means are 3
    write_curve(tmp_path / "a-second", noise, first_step=31, started=2000.0)
    write_curve(tmp_path / "b-first", [*noise, 1.0], first_step=1, started=1000.0)
    write_curve(tmp_path / "c-third", [5.0, 3.0, 2.0], first_step=1, started=3000.0)
    page = run_report_page(collect(tmp_path))
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", page)]
    assert [row for row in rows if row] == [
        ["b-first", "1-31", "-", "3.0000", "2.7000", "10"],
        ["a-second", "31-60", "-", "3.0000", "3.0000", "10"],
        ["c-third", "1-3", "-", "5.0000", "2.0000", "1"],
    ]
    assert "means over the first and the last 10 logged steps" in page


def test_runs_without_times_come_by_their_steps(tmp_path):
    for name, first in (("a.jsonl", 11), ("b.jsonl", 1)):
        lines = [{"iteration": first + step, "lm loss": 3.0 + step} for step in range(10)]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [curve.name for curve in collect(tmp_path).curves] == ["b.jsonl", "a.jsonl"]


def test_names_are_escaped(run_dir):
    folder = run_dir.rename(run_dir.with_name("<b>run"))
    assert "<b>run" not in run_report_page(collect(folder))


def test_a_damaged_report_is_named_and_left_out(run_dir, tmp_path):
    damaged = run_dir / "evaluation" / "iter_0000010" / "needle.json"
    damaged.write_text('{"kind": "needle"}')
    found = collect(run_dir)
    assert [item.iteration for item in found.needles] == [9, 100]
    assert "iter_0000010/needle.json" in found.left_out[0]
    write_run_report(tmp_path / "r.html", found)
    assert "iter_0000010/needle.json" in (tmp_path / "r.html").read_text()


def test_what_cannot_be_opened_is_named(run_dir):
    (run_dir / "folder.json").mkdir()
    (run_dir / "folder.jsonl").mkdir()
    (run_dir / "gone.json").symlink_to(run_dir / "nowhere")
    (run_dir / "evaluation" / "iter_0000010" / "progress.json").write_text("{")
    found = collect(run_dir)
    assert [item.label for item in found.needles] == ["9M tokens", "step 10", "100M tokens"]
    text = "\n".join(found.left_out)
    assert len(found.left_out) == 4, text
    for name in ("folder.json ", "folder.jsonl", "gone.json", "iter_0000010/progress.json"):
        assert name in text


def test_rates_of_the_timer_stand_at_their_steps(tmp_path):
    """A timer logged every fourth step, and a batch size that was logged once."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        for step in range(1, 10):
            writer.add_scalar("lm loss", 1.0, step)
            if step % 4 == 0:
                writer.add_scalar("iteration-time", step, step)
        writer.add_scalar("batch-size", 2, 1)
    (tmp_path / "run.json").write_text(json.dumps({"argv": ["--seq-length", "1000"]}))
    (curve,) = collect(tmp_path).curves
    assert curve.tokens_per_second == [(4, 500.0), (8, 250.0)]
    assert curve.tokens[-1] == 9 * 2000
    page = run_report_page(collect(tmp_path))
    assert "checkpoints do not count" in page
    assert "checkpoints count" not in page


def test_reports_on_other_documents_have_their_own_section(run_dir, tmp_path):
    report = make_loss(1.4321)
    settings = replace(report.settings, dataset_fingerprint="other", dataset="books")
    path = run_dir / "apart.json"
    write_loss_report(path, LossReport(settings, report.loss))
    os.utime(path, (1, 1))
    page = run_report_page(collect(run_dir))
    assert ">Loss by source and position</h2>" in page
    assert ">Loss by source and position: other documents 1</h2>" in page
    assert "<td>1.4321</td>" in page
    path.rename(tmp_path / "apart.json")
    with pytest.raises(ConfigError, match=r"--baseline .*apart.json was made with another"):
        collect(run_dir, baseline=tmp_path / "apart.json")


def test_only_a_converted_model_is_the_start(run_dir):
    needle = make_needle(1000)
    for origin in ("release", "hf", "random"):
        settings = replace(needle.settings, iteration=origin, model=f"models/{origin}-model")
        report = NeedleReport(settings, needle.results)
        write_needle_report(run_dir / f"{origin}.json", report)
    found = collect(run_dir)
    labels = {item.path.stem: (item.label, item.is_of_training) for item in found.needles}
    assert labels["release"] == ("start", True)
    assert labels["hf"] == ("hf-model (hf)", False)
    assert labels["random"] == ("random-model (random)", False)
    page = run_report_page(found)
    assert ">Needle of another model</h2>" in page


def test_trainings_come_in_the_order_they_were_measured(run_dir):
    """A shorter training after a longer one: its steps are smaller."""
    later = make_loss(1.0)
    settings = replace(later.settings, checkpoint="stretched", iteration="5")
    path = run_dir / "after.json"
    write_loss_report(path, LossReport(settings, later.loss))
    os.utime(path, (path.stat().st_mtime + 100,) * 2)
    assert [item.iteration for item in collect(run_dir).losses] == [9, 10, 100, 5]
    chosen = collect(run_dir, baseline=path)
    assert [item.iteration for item in chosen.losses] == [5, 9, 10, 100]


def test_folders_without_a_run_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        collect(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds nothing of a run"):
        collect(tmp_path)


def test_tool(run_dir):
    command = [sys.executable, "tools/report.py", str(run_dir)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "3 needle reports, 3 loss reports" in result.stdout
    assert (run_dir / "report.html").stat().st_size > 100_000
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert again.returncode == 2
    assert "--force" in again.stderr
