"""nvidia-resiliency-ext: its launcher instead of torchrun, its writer for saving in the background.

The tests of the package itself run where it is installed (`pip install 'nvidia-resiliency-ext>=0.6'`).
"""

import importlib.util
import os
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import psutil
import pytest

from megatron_long import launch
from megatron_long.checkpoint.choosing import check_whole, saved_iterations
from megatron_long.engine import megatron_adapter
from megatron_long.errors import ConfigError
from megatron_long.flags.rules import check_rules
from megatron_long.job import hang_monitor
from tests.launched import GRACE_S, count_lines, start_launcher, tracked, wait_until

IS_INSTALLED = importlib.util.find_spec("nvidia_resiliency_ext") is not None
installed = pytest.mark.skipif(not IS_INSTALLED, reason="nvidia-resiliency-ext is not installed")


@pytest.mark.parametrize(
    ("package", "save", "socket", "words"),
    [
        ("no_such_package", "x", "x", "--enable-ft-package needs nvidia-resiliency-ext; pip inst"),
        ("json", None, "x", "give --save"),
        ("json", "x", None, "start with python -m megatron_long.launch"),
        ("json", "x", "x", None),
    ],
)
def test_what_the_monitor_needs_is_checked(package, save, socket, words, monkeypatch):
    monkeypatch.setattr(hang_monitor, "MONITOR_PACKAGE", package)
    monkeypatch.delenv(hang_monitor.MONITOR_SOCKET, raising=False)
    if socket:
        monkeypatch.setenv(hang_monitor.MONITOR_SOCKET, socket)
    args = Namespace(enable_ft_package=True, inprocess_restart=False, save=save)

    def check() -> None:
        check_rules(args)
        hang_monitor.check_monitor_is_there(args)

    if words is None:
        check()
        return
    with pytest.raises(ConfigError) as refused:
        check()
    assert words in str(refused.value)


def test_an_old_package_is_named_before_megatron_fails_on_it(monkeypatch):
    versions = {"megatron-core": "0.19.2", "nvidia-resiliency-ext": "0.5.1"}
    monkeypatch.setattr(megatron_adapter.importlib.metadata, "version", versions.__getitem__)
    with pytest.raises(
        ConfigError,
        match=r"0\.5\.1 .* needs 0.6 or later and fails to import; upgrade it",
    ):
        megatron_adapter.check_version()
    versions["nvidia-resiliency-ext"] = "0.10.0"
    megatron_adapter.check_version()


def test_the_launcher_of_the_package_gets_timeouts(monkeypatch, tmp_path):
    folder = tmp_path / "stand_in" / "fault_tolerance"
    folder.mkdir(parents=True)
    (folder / "launcher.py").write_text("calls = []\nmain = calls.append\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hang_monitor, "MONITOR_PACKAGE", "stand_in")
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "")
    words = ["--nproc-per-node=2", "-m", "x", "--hang-timeout=10", "--enable-ft-package"]
    launch.main(words)
    (call,) = sys.modules["stand_in.fault_tolerance.launcher"].calls
    sections = "--ft-rank-section-timeouts=setup:50,step:50,checkpointing:50"
    assert call[:2] == [sections, "--ft-rank-out-of-section-timeout=50"]
    flag, folder = call[2].split("=")
    assert (flag, Path(folder).exists()) == (
        "--log-dir",
        False,
    )  # made for the launcher, and removed
    assert call[3:] == words
    assert "SIGTERM" not in os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"]
    monkeypatch.setattr(hang_monitor, "MONITOR_PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match="needs nvidia-resiliency-ext"):
        launch.main(words)


@installed
@pytest.mark.slow
def test_a_rank_that_the_kernel_has_stopped_is_replaced(tiny_dataset, jobs, tmp_path):
    """Which our own watchdog cannot see. Then a signal to the launcher is handed on as by torchrun."""
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    jobs.run(1, "--train-iters", 1, "--save", tmp_path / "base")
    flags = ("--pretrained-checkpoint", tmp_path / "base", "--load", out, "--save", out)
    flags += ("--save-interval", 5, "--train-iters", 300, "--allow-repeat", "--loss-log", log)
    options = ("--max-restarts=1", "--ft-rank-section-timeouts=setup:120,step:5,checkpointing:60")
    options += ("--ft-rank-out-of-section-timeout=10",)
    launcher = start_launcher(tiny_dataset, *flags, "--enable-ft-package", options=options)
    try:
        wait_until(lambda: count_lines(log) >= 12)
        ranks = [
            child
            for child in psutil.Process(launcher.pid).children()
            if child.environ().get("RANK") == "1"
        ]
        began, seen = time.monotonic(), count_lines(log)
        ranks[0].suspend()
        wait_until(lambda: count_lines(log) > seen + 5)
        print(f"trains again {time.monotonic() - began:.0f} s after a rank was stopped")
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(GRACE_S) == 0
    finally:
        if launcher.poll() is None:
            for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
                process.kill()
    steps = [line.split(",")[0] for line in log.read_text().splitlines()]
    assert len(set(steps)) < len(steps)  # those since the last save were repeated
    assert steps[-1].endswith(f" {tracked(out)}")
    assert check_whole(out / f"iter_{tracked(out):07d}")


@installed
@pytest.mark.slow
def test_its_writer_saves_in_the_background(jobs, tmp_path):
    flags = (
        "--train-iters",
        9,
        "--save-interval",
        4,
        "--async-save",
        "--keep-last",
        2,
        "--verbose",
    )
    job = jobs.run(2, *flags, "--save", tmp_path, "--use-distributed-optimizer")
    assert "async_strategy .................................. nvrx" in job.text
    assert saved_iterations(tmp_path) == [9, 8]
    assert all(check_whole(tmp_path / f"iter_{number:07d}") for number in (8, 9))
