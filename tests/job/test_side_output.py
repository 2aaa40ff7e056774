"""What is written next to the checkpoints fails, for real where that can be had; training would go on."""

import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_long.files import append_whole
from megatron_long.job import side_output
from megatron_long.job.side_output import SurvivingStream, SurvivingWriter

REPOSITORY = Path(__file__).resolve().parents[2]
FULL = Path("/dev/full")
"""Each write to it fails as on a full disk."""


def test_what_does_not_fit_whole_is_not_appended(tmp_path):
    """The kernel takes four bytes of the second text, and refuses the rest."""
    path = tmp_path / "log.jsonl"
    append_whole(path, "one\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_whole(path, "two, and more\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "one\n"


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_prints_on_a_full_disk_are_lost_and_nothing_else(tmp_path):
    stream = SurvivingStream(FULL.open("w"))
    print("lost", file=stream, flush=True)
    assert stream.write("four") == 4
    with (tmp_path / "file").open("w") as file:
        print("kept", file=SurvivingStream(file), flush=True)
    assert (tmp_path / "file").read_text() == "kept\n"


def test_a_run_outlives_the_reader_of_its_output():
    """As with `| tee log`, where SLURM's signal has ended the tee."""
    program = (
        "import sys; from megatron_long.job import side_output as s; s.keep_standard_streams()\n"
    )
    program += "for n in range(20_000): print(n, flush=True)\nprint('done', file=sys.stderr)"
    result = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | head -n 1; exit ${PIPESTATUS[0]}', sys.executable, program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert (result.stdout, result.stderr, result.returncode) == ("0\n", "done\n", 0)


class Board:
    """A writer that fails while `fails` is set."""

    fails = False

    def __init__(self) -> None:
        self.taken: list[tuple] = []
        self.log_dir = "runs"

    def add_scalar(self, *figure: object) -> str:
        if Board.fails:
            raise OSError(28, "No space left on device")
        self.taken.append(figure)
        return "taken"


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(time=1000.0)
    monkeypatch.setattr(side_output.time, "monotonic", lambda: now.time)
    monkeypatch.setattr(Board, "fails", False)
    return now


def test_a_writer_that_fails_is_opened_again(clock, monkeypatch, caplog):
    caplog.set_level("WARNING")
    boards = [Board(), Board()]
    opened = iter(boards[1:])
    writer = SurvivingWriter("TensorBoard", boards[0], lambda: next(opened))
    assert writer.log_dir == "runs"
    assert writer.add_scalar("loss", 1) == "taken"
    monkeypatch.setattr(Board, "fails", True)
    assert writer.add_scalar("loss", 2) is None
    monkeypatch.setattr(Board, "fails", False)
    clock.time += side_output.RETRY_AFTER_S - 1
    assert writer.add_scalar("loss", 3) is None  # not tried yet
    clock.time += 2
    assert writer.add_scalar("loss", 4) == "taken"
    assert [board.taken for board in boards] == [[("loss", 1)], [("loss", 4)]]
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2
    assert "TensorBoard accepts no figures (OSError: [Errno 28]" in messages[0]
    assert messages[1] == "TensorBoard accepts figures again"


def test_a_writer_that_cannot_be_opened_again_is_reported_once(clock, monkeypatch, caplog):
    def reopen() -> None:
        raise OSError(28, "No space left on device")

    writer = SurvivingWriter("TensorBoard", Board(), reopen)
    monkeypatch.setattr(Board, "fails", True)
    for _ in range(5):
        assert writer.add_scalar("loss", 1) is None
        clock.time += side_output.RETRY_AFTER_S + 1
    assert len(caplog.records) == 1


def test_what_needs_a_writer_that_is_off_is_not_tried(clock, monkeypatch, caplog):
    """As Megatron's note of a checkpoint, which asks the writer for an artifact first."""
    writer = SurvivingWriter("W&B", Board())
    monkeypatch.setattr(Board, "fails", True)
    assert writer.attempt(lambda: writer.add_scalar("loss", 1).upper()) is None
    assert writer.attempt(lambda: pytest.fail("tried")) is None
    assert len(caplog.records) == 1
    monkeypatch.setattr(Board, "fails", False)
    clock.time += side_output.RETRY_AFTER_S + 1
    assert writer.attempt(lambda: writer.add_scalar("loss", 2)) == "taken"


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_survived_reports(caplog):
    with side_output.survived("results"), FULL.open("w") as file:
        file.write("x")
    assert "results could not be written (OSError: [Errno 28]" in caplog.text
