"""The walk at full size: what it refuses, how it ends its commands, what its report says, and a tiny walk."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from benchmarks import full_size
from benchmarks.walk import children, hf_model, logs, phases, ready, report, settings, training
from benchmarks.walk.budget import Cost
from benchmarks.walk.context import Context, read_records
from benchmarks.walk.settings import Settings, Work
from megatron_long.errors import ConfigError
from tests.conftest import make_text, write_corpus

REPOSITORY = Path(__file__).resolve().parents[2]
Usage = namedtuple("Usage", "total used free")


def record(folder: Path, phase: str, **facts: object) -> None:
    """Add a record as a phase leaves it."""
    whole = {"phase": phase, "status": "done", "seconds": 10.0, "host_peak_gb": 3.0}
    whole |= {"host_start_gb": 1.0, "host_method": "cgroup anon + shmem", **facts}
    with (folder / "records.jsonl").open("a") as file:
        file.write(json.dumps(whole) + "\n")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(900e9, 0, 900e9))
    data = tmp_path / "data"
    (data / "mix").mkdir(parents=True)
    (data / "mix" / "manifest.json").touch()
    return Work(folder=tmp_path, settings=Settings(), data=data)


# What keeps a phase from being begun ----------------------------------------------------------


def test_sizes_are_those_of_the_real_model():
    whole = Settings()
    assert whole.num_parameters == 8_030_261_248
    assert whole.checkpoint_gb == pytest.approx(112.4, abs=0.1)


def test_layout_must_fill_the_processes():
    with pytest.raises(ConfigError, match=r"tensor 2 \* context 4 takes 8 processes"):
        Settings(context=4)


def test_a_phase_needs_those_before_it(work):
    assert "needs convert" in ready.why_not("train", work, None, set())
    record(work.folder, "convert")
    assert ready.why_not("resume", work, None, set()) == "it needs train, which is not done"
    record(work.folder, "train")
    assert ready.why_not("resume", work, None, set()) is None
    assert "needs train" in ready.why_not("resume", work, None, {"train"})
    record(work.folder, "train", status="failed: x")
    assert "needs train" in ready.why_not("resume", work, None, set())


def test_a_disk_without_room_is_named_with_figures(work, monkeypatch):
    record(work.folder, "convert")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(200e9, 100e9, 100e9))
    said = ready.why_not("train", work, None, set())
    assert f"writes 112.4 GB to --work {work.folder}, and 100.0 GB are free" in said
    assert ready.why_not("write-hf", work, None, set()) is None


def test_no_phase_begins_that_would_not_end_in_time(work):
    now, expected = time.monotonic() - ready.STARTED, ready.expected_s("write-hf", work.settings)
    said = ready.why_not("write-hf", work, now + expected / 2, set())
    assert f"expected to take {expected:.0f} s" in said
    assert ready.why_not("write-hf", work, now + expected + 60, set()) is None


def test_the_checkpoint_is_not_removed_under_its_readers(work):
    record(work.folder, "convert")
    work.run.mkdir()
    assert "resume, reshard, loss" in ready.why_not("async", work, None, set())
    assert ready.why_not("async", work, None, set(), drops=True) is None


def test_each_phase_but_data_is_in_one_group():
    names = [name for group in phases.GROUPS for name in group]
    assert sorted(["data", *names]) == sorted(phases.PHASES)


def test_phases_of_a_group_run_at_once_and_leave_records(work, monkeypatch, tmp_path):
    both = threading.Barrier(2)

    def meet(_: Context) -> dict:
        both.wait(60)
        return {"met": True}

    def fail(_: Context) -> dict:
        raise children.PhaseFailed("as it should")

    for name, do in (("disk", meet), ("write-hf", meet), ("data", fail)):
        phase = phases.Phase(do, (), Cost(other=1))
        monkeypatch.setitem(phases.PHASES, name, phase)
    args, failed = Namespace(again=[], until_s=None, drop_checkpoint=False), set()
    full_size.run_group(("disk", "write-hf"), work, args, failed)
    full_size.run_group(("data",), work, args, failed)
    assert failed == {"data"}
    found = read_records(work.folder)
    assert found["disk"]["met"]
    assert found["disk"]["beside"] == ["write-hf"]
    copies = tmp_path / "copies"
    copies.mkdir()
    full_size.leave_copies(work, copies)
    assert "failed: PhaseFailed: as it should" in (copies / "report.md").read_text()
    assert len((copies / "records.jsonl").read_text().splitlines()) == 3


def test_another_walk_in_the_same_folder_is_refused(tmp_path):
    path = tmp_path / "settings.json"
    settings.keep_settings(Settings(), path)
    settings.keep_settings(Settings(), path)
    with pytest.raises(ConfigError, match="windows 1 -> 2"):
        settings.keep_settings(Settings(windows=2), path)


# Commands -------------------------------------------------------------------------------------

FAMILY = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("child", child.pid, flush=True)
child.wait()
"""


def test_killing_reaches_children_in_sessions_of_their_own(tmp_path):
    command = [sys.executable, "-c", FAMILY]
    ended = children.run(command, tmp_path / "log", os.environ, watch=lambda c: c.saw("child"))
    assert ended.status is None
    assert not psutil.pid_exists(int(ended.lines[-1][1].split()[1]))


def test_a_command_ends_at_the_deadline_and_its_output_stays(tmp_path):
    command, log = [sys.executable, "-c", FAMILY], tmp_path / "log"
    seen: list[children.Child] = []
    with pytest.raises(children.OutOfTime):
        children.run(
            command,
            log,
            os.environ,
            watch=lambda c: bool(seen.append(c)),  # type: ignore[func-returns-value]
            deadline=time.monotonic() + 1,
        )
    assert not psutil.pid_exists(seen[0].process.pid)
    assert log.read_text().startswith("$ ")


def test_a_command_in_a_thread_ends_when_the_walk_is_told_to(tmp_path, monkeypatch):
    stop = threading.Event()
    monkeypatch.setattr(children, "STOP", stop)
    command, seen = [sys.executable, "-c", FAMILY], list[children.Child]()

    def watch(child: children.Child) -> bool:
        seen.append(child)
        stop.set()
        return False

    with pytest.raises(children.OutOfTime):
        children.run(command, tmp_path / "log", os.environ, watch=watch)
    assert not psutil.pid_exists(seen[0].process.pid)


def test_status_is_reported(tmp_path):
    command = [sys.executable, "-c", "print('why'); raise SystemExit(3)"]
    with pytest.raises(children.PhaseFailed, match="status 3"):
        children.run(command, tmp_path / "log", os.environ)
    assert "why" in children.tail(tmp_path / "log")


# Logs and report ------------------------------------------------------------------------------

LOG = [
    (50.0, "using world size: 4, data-parallel size: 1"),
    (60.0, "[after megatron is initialized] datetime: 2026"),
    (65.0, " loading distributed checkpoint from base at iteration 0"),
    (75.0, "  successfully loaded checkpoint from base [ t 1/2 ] at iteration 0"),
    (76.0, "[after dataloaders are built] datetime: 2026"),
    (77.0, "[before the start of training step] datetime: 2026"),
    (
        97.0,
        " iteration        1/      40 | elapsed time per iteration (ms): 20000.0 | lm loss: 1 |",
    ),
    (
        106.0,
        " iteration        2/      40 | elapsed time per iteration (ms): 9000.0 | lm loss: 1 |",
    ),
    (106.1, "saving checkpoint at iteration       2 to run in torch_dist format"),
    (186.1, " [2026] successfully saved checkpoint from iteration       2 to run"),
    (
        195.1,
        " iteration        3/      40 | elapsed time per iteration (ms): 9000.0 | lm loss: 1 |",
    ),
    (195.2, "[Rank 0] (after 3 iterations) memory (MB) | allocated: 1.0 | max allocated: 2048.0 |"),
]


def test_log_tells_start_save_and_pause():
    parts = logs.start_times(LOG)
    assert sum(parts.values()) == 77
    assert parts["checkpoint loaded"] == 10
    assert logs.saves(LOG) == {2: 80.0}
    assert logs.load_seconds(LOG) == 10
    assert logs.pauses(LOG, 2) == {3: pytest.approx(80.1)}  # 89.1 s apart, 9 s as usual
    assert logs.peak_gpu_gib(LOG) == 2.0


def test_the_first_save_in_the_background_is_found():
    line = "scheduled an async checkpoint save at iteration       {} to run"
    lines = [(1.0, "x"), (2.0, line.format(3)), (9.0, line.format(7))]
    assert logs.first_scheduled(lines) == 3
    assert logs.first_scheduled(lines[:1]) is None


def test_steps_are_compared_to_two_after_the_interruption(tmp_path):
    work = Work(folder=tmp_path, settings=Settings())
    assert training.last_step(work) == settings.LAST_STEP
    record(tmp_path, "train", interrupted_at=3)
    assert training.last_step(work) == 5


def write_losses(path: Path, losses: dict[int, float]) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps({"iteration": step, "lm loss": loss}) for step, loss in losses.items()]
    path.write_text("\n".join(lines) + "\n")


def test_losses_of_a_line_that_is_being_written_are_not_read(tmp_path):
    path = tmp_path / "loss.jsonl"
    path.write_text('{"iteration": 1, "lm loss": 2.0}\n{"iteration": 2, "lm')
    assert logs.read_losses(path) == {1: 2.0}
    assert logs.read_losses(path, path.stat().st_size) == {}


def test_report_sets_bounds_beside_what_was_measured(tmp_path):
    rates = {"write": 2.0, "hash": 10.0, "read_cached": 10.0, "read_disk": 2.0}
    record(tmp_path, "disk", rates_gb_per_s=rates)
    facts = {"start_s": {"first step begins": 80.0}, "launch_to_first_step_s": 80.0}
    train = {"save_s": {"2": 100.0, "3": 140.0}, "checkpoint_gb": 112.0, "first_step_s": 20.0}
    record(tmp_path, "train", **train, **facts)
    record(tmp_path, "async", stopped_s=12.0)
    text = report.report(tmp_path, Settings())
    assert (
        "save of 112.0 GB: 2 x (stream + hash) | 134.4 s | 140.0 s (0.80 GB/s) | **BROKEN** |"
        in text
    )
    assert "1.5 x the checkpoint | 168.0 GB | 2.0 GB | holds |" in text
    assert "launch to the first step (train) | 90 s | 80.0 s | holds |" in text
    assert "training stops for --async-save | 10 s | 12.0 s | **BROKEN** |" in text


def test_losses_are_compared_with_a_run_that_never_stopped(tmp_path):
    results = tmp_path / "results"
    write_losses(results / "uninterrupted.jsonl", {1: 9.0, 2: 8.0, 3: 7.0, 4: 6.0, 5: 5.0})
    write_losses(results / "train.jsonl", {1: 9.0, 2: 8.0, 3: 7.0})
    write_losses(results / "resume.jsonl", {4: 6.0, 5: 5.0})
    write_losses(results / "reshard.jsonl", {4: 6.1, 5: 5.0})
    found = {
        row[0]: row for row in report.comparisons(tmp_path, Settings(deterministic=True), True)
    }
    assert found["resume against uninterrupted"][3] is True
    assert found["reshard against uninterrupted"][3] is False
    write_losses(results / "resume.jsonl", {4: 6.0, 5: 5.0000001})
    found = {
        row[0]: row for row in report.comparisons(tmp_path, Settings(deterministic=True), True)
    }
    assert found["resume against uninterrupted"][1] == "equal bits"
    assert found["resume against uninterrupted"][3] is False


# The walk -------------------------------------------------------------------------------------


def test_weights_have_the_deviations_of_a_trained_model(tmp_path):
    from safetensors.torch import load_file

    geometry = settings.TINY
    hf_model.write_model(tmp_path, geometry, 2)
    places = json.loads((tmp_path / hf_model.INDEX_FILE).read_text())["weight_map"]
    tensors = load_file(tmp_path / places["model.layers.0.mlp.down_proj.weight"])
    assert tensors["model.layers.0.mlp.down_proj.weight"].float().std().item() == pytest.approx(
        0.02 / 2, rel=0.05
    )
    assert tensors["model.embed_tokens.weight"].float().std().item() == pytest.approx(
        0.02, rel=0.05
    )
    assert tensors["model.norm.weight"].float().mean().item() == pytest.approx(1, abs=0.02)


def make_corpus(folder: Path) -> Path:
    """Two sources and a haystack."""
    folder.mkdir()
    write_corpus(folder / "corpus.jsonl", num_documents=300)
    (folder / "heldout").mkdir()
    (folder / "heldout" / "book.txt").write_text(make_text(random.Random(7), 4000))
    return folder


@pytest.mark.slow
def test_a_tiny_walk_on_two_processes(warm_python, tmp_path):
    corpus, folder = make_corpus(tmp_path / "corpus"), tmp_path / "walk"
    command = [str(warm_python), "benchmarks/full_size.py", "--work", str(folder), "--size", "tiny"]
    command += ["--layout", "1", "2", "--reshard-layout", "2", "1", "--seq-length", "512"]
    command += ["--deterministic-mode", "--corpus", str(corpus), "--phases", "data", "write-hf"]
    command += "convert+disk train resume reshard+export loss+needle+transformers async".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    records = read_records(folder)
    assert {record["status"] for record in records.values()} == {"done"}
    assert len(records) == 12
    assert 1 <= records["train"]["interrupted_at"] < training.TRAIN_STEPS
    assert not (folder / "run").exists()  # removed by async, which said so
    assert any("removed" in note for note in records["async"]["notes"])
    found = report.comparisons(
        folder, Settings(**json.loads((folder / "settings.json").read_text())), False
    )
    assert len(found) == 4
    assert all(row[3] for row in found), found
    again = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0
    assert again.stdout.count("done before") == 12
