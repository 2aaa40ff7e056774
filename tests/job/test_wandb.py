"""W&B next to training, without a network: its real package and service, writing to files."""

import contextlib
import signal

import psutil
import pytest

from megatron_long.checkpoint.choosing import check_whole
from tests.evaluation.fakes import make_story
from tests.launched import (
    GRACE_S,
    count_lines,
    end_all,
    start_launcher,
    tracked,
    wait_for_helpers,
)

pytest.importorskip("wandb")
FLAGS = ("--wandb-project", "megatron-long", "--wandb-exp-name", "test")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.slow
def test_figures_and_heatmaps_reach_it(offline, tiny_dataset, tmp_path):
    out, story = tmp_path / "out", tmp_path / "story.txt"
    story.write_text(make_story(200))
    launcher = start_launcher(
        *(tiny_dataset, "--train-iters", 2, "--log-interval", 1, "--save", out, *FLAGS),
        *("--tensorboard-dir", tmp_path / "board", "--seq-length", 1024),
        *("--max-position-embeddings", 1024, "--global-batch-size", 2, "--allow-repeat"),
        *("--needle-interval", 2, "--needle-haystack", story, "--needle-min-length", 700),
        *("--needle-num-lengths", 2, "--needle-num-depths", 2),
    )
    try:
        assert launcher.wait(120) == 0
    finally:
        end_all(launcher)
    assert list(out.glob("wandb/wandb/offline-run-*/*.wandb"))
    assert list(out.glob("wandb/wandb/offline-run-*/files/media/images/needle/heatmap_*.png"))
    assert (out / "evaluation" / "iter_0000002" / "needle.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_end_of_its_service_costs_no_checkpoint(number, offline, tiny_dataset, tmp_path):
    """SLURM's signal goes to every process; SIGTERM ends the service of W&B before the last save."""
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    launcher = start_launcher(
        *(tiny_dataset, "--save", out, "--loss-log", log, "--allow-repeat", "--train-iters", 300),
        *("--save-interval", 10, "--tensorboard-dir", tmp_path / "board", *FLAGS),
    )
    try:
        processes = wait_for_helpers(launcher, out)
        assert any("wandb" in process.name() for process in processes)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        assert launcher.wait(GRACE_S) == 0
        assert tracked(out) == count_lines(log) < 300
        assert check_whole(out / f"iter_{tracked(out):07d}")
        assert psutil.wait_procs(processes, 10)[1] == []
    finally:
        end_all(launcher)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (FLAGS[:2], "give --wandb-exp-name"),
        (FLAGS, "give --save or --wandb-save-dir"),
    ],
)
def test_what_it_needs_is_asked_for_at_once(flags, words, jobs):
    jobs.start(1, "--train-iters", 1, *flags)
    job = jobs.wait()
    assert job.statuses == [2]
    assert words in " ".join(job.text.split())
