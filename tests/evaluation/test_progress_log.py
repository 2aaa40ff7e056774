"""The log of an evaluation: one reader, whose view and refusals are those of the whole job."""

import errno
import fcntl
from dataclasses import asdict
from pathlib import Path

from megatron_long.evaluation.bookqa import BookAnswer
from megatron_long.evaluation.progress_log import append_records, shared_log, start_log

WORKER = Path(__file__).with_name("progress_log_worker.py")
ANSWER = BookAnswer(3, 10, False, "caf\u00e9", 0.1, 1 / 3)


def test_every_rank_is_given_what_rank_0_reads(run_job, tmp_path):
    start_log(tmp_path / "log.jsonl", {"a": 1}, [])
    append_records(tmp_path / "log.jsonl", [asdict(ANSWER)])
    run_job(2, [WORKER, tmp_path, 1])
    assert [(tmp_path / rank).read_text() for rank in "01"] == [repr([ANSWER])] * 2
    run_job(2, [WORKER, tmp_path, 2], check=False)
    for rank in "01":
        assert "results of another command (a 1 there, 2 here)" in (tmp_path / rank).read_text()


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with shared_log(tmp_path / "log.jsonl", {}, BookAnswer, force=False) as records:
        assert records == []
    assert "No locks available" in caplog.text
