"""A run whose first save was cut short: the same command starts it again, whatever was left."""

import runpy
import signal
import sys

import pytest

from megatron_long.checkpoint.choosing import check_whole, saved_iterations
from megatron_long.errors import ConfigError
from tests.fake_checkpoints import write_fake_checkpoint
from tests.job_fixtures import FLAGS
from tests.launched import REPOSITORY, tracked

KILL = {"kind": "kill-at-write", "ranks": [0], "name": "/.metadata.tmp"}
FULL = {"kind": "full-disk", "ranks": [0], "name": ".distcp"}
SAVE_FAILED = 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "more", "status"),
    [
        (KILL, (), -signal.SIGKILL),
        (KILL, ("--async-save",), -signal.SIGKILL),
        (FULL, (), SAVE_FAILED),
    ],
    ids=["killed", "killed in the background", "full disk"],
)
def test_the_next_start_works(fault, more, status, flags, jobs, tmp_path, monkeypatch, capsys):
    """By Megatron's own loop and writer, which makes folders of its own."""
    out = tmp_path / "out"
    same = (*flags, "--save-interval", 2, "--exit-interval", 4, *more)
    told = jobs.run(1, *same, faults=[fault], status=status).text
    assert ("checkpoint could not be saved; there is none" in told) is (fault is FULL)
    assert bool(list(out.glob(".iter_*.partial"))) is (fault is KILL)
    assert saved_iterations(out) == []
    words = ["check_layout.py", "--world-size", 1, *FLAGS, "--dataset", jobs.dataset, *same]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    assert runpy.run_path(str(REPOSITORY / "tools/check_layout.py"))["main"]() == 0
    assert "layout ok" in capsys.readouterr().out
    jobs.run(1, *same)
    assert tracked(out) == 4
    assert sorted(path.name for path in out.glob("*iter_0*")) == ["iter_0000002", "iter_0000004"]
    assert check_whole(out / "iter_0000002")
    assert check_whole(out / "iter_0000004")


def test_a_job_that_saved_while_this_one_waited_for_the_folder(tmp_path, monkeypatch, tiny_dataset):
    """Both were started at once, in a folder that was not there: it could not be held at the first look."""
    from megatron_long import pretrain
    from megatron_long.job.start_log import StartLog

    out = tmp_path / "out"
    looked, hold = [], pretrain.hold_save

    def hold_after_the_other(save):
        looked.append(save)
        if len(looked) == 2:
            write_fake_checkpoint(out, 6)
        hold(save)

    monkeypatch.setattr(pretrain, "hold_save", hold_after_the_other)
    monkeypatch.setattr(pretrain, "_train", lambda *words: looked.append("trained"))
    argv = [*FLAGS, "--dataset", str(tiny_dataset), "--allow-repeat", "--train-iters", "9"]
    with StartLog(verbose=True) as log, pytest.raises(ConfigError, match="up to step 6"):
        pretrain._run([*argv, "--save", str(out)], log)
    assert "trained" not in looked
