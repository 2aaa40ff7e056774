"""The loss log: its lines follow when there is room again."""

import json
import os
from pathlib import Path

import pytest

from megatron_long.engine.callback import Log
from megatron_long.errors import ConfigError
from megatron_long.files import append_whole
from megatron_long.training.callbacks import step_logs
from megatron_long.training.callbacks.step_logs import LossLog
from megatron_long.training.start import check_loss_log

FULL = Path("/dev/full")
"""Each write to it fails as on a full disk."""


def steps(path: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines()]


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_lines_of_the_loss_log_follow_later(tmp_path, monkeypatch, caplog):
    path, room = tmp_path / "folder" / "log.jsonl", [True, False, False, True, True]

    def append(target: Path, text: str) -> None:
        append_whole(target if has_room else FULL, text)

    monkeypatch.setattr(step_logs, "append_whole", append)
    log = LossLog(path, writes=True)
    caplog.set_level("WARNING")
    for step, has_room in enumerate(room, 1):  # noqa: B007 (append reads it)
        log.on_log(Log(step, {"lm loss": 4.5}, None))
    assert steps(path) == [1, 2, 3, 4, 5]
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2
    assert "No space left on device" in messages[0]
    assert "is written again, complete" in messages[1]


def test_only_one_rank_writes_the_loss_log(tmp_path):
    LossLog(tmp_path / "log.jsonl", writes=False).on_log(Log(1, {}, None))
    assert not list(tmp_path.iterdir())


def test_a_loss_log_that_takes_no_lines_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("kept\n")
    os.mkfifo(tmp_path / "pipe")
    for name in ("", "file/log.jsonl", "pipe"):
        path = tmp_path / name
        with pytest.raises(ConfigError, match=rf"--loss-log {path} cannot be written to"):
            check_loss_log(str(path), writes=True)
        check_loss_log(str(path), writes=False)  # by this process: it may be on another machine
    for name in ("file", "new/log.jsonl"):
        check_loss_log(str(tmp_path / name), writes=True)
    assert (tmp_path / "file").read_text() == "kept\n"
    assert not list((tmp_path / "new").iterdir())


def test_no_rank_trains_where_the_last_one_cannot_write_its_log(jobs, tmp_path):
    told = jobs.run(2, "--train-iters", 2, "--loss-log", tmp_path, status=2).text
    assert " ".join(told.split()).count("cannot be written to") == 1
    assert "iteration " not in told
