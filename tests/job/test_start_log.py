"""A start is a few lines; what Megatron says is in a file, and shown when the start fails."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from megatron_long.errors import ConfigError
from megatron_long.job.start_log import SHOWN_LINES, StartLog, start_log_path

MOST_LINES = 40
FIRST_STEP = "iteration        1/"


class OwnFilter(logging.StreamHandler):
    """As Megatron's `CustomHandler`."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.name.startswith("torch")


def test_prints_logs_and_warnings_of_others_are_kept(tmp_path, capsys):
    path = tmp_path / "logs" / "start.log"
    handler = OwnFilter(sys.stdout)
    logging.root.addHandler(handler)
    try:
        with StartLog(verbose=False) as log:
            handler.setStream(log)
            log.take_logging()
            print("before the file")
            log.write_to(path)
            print("after it")
            logging.getLogger("megatron.core").warning("theirs")
            logging.getLogger("megatron_long.training").warning("ours")
            logging.getLogger("megatron.core").error("an error")
            logging.getLogger("torch.x").error("filtered")
            warnings.warn("deprecated", stacklevel=1)
            log.say("a line of ours")
            log.end()
            print("the first step")
            logging.getLogger("megatron.core").warning("a step")
    finally:
        logging.root.removeHandler(handler)
    shown = ["ours", "an error", "a line of ours", "the first step", "a step"]
    assert capsys.readouterr().out.splitlines() == shown
    kept = path.read_text()
    assert kept.startswith("before the file\nafter it\nWARNING:megatron.core:theirs\n")
    assert "deprecated" in kept
    assert "step" not in kept


def start(lines: list[str], error: BaseException) -> None:
    with StartLog(verbose=False):
        print(*lines, sep="\n")
        raise error


@pytest.mark.parametrize("error", [RuntimeError("broken"), SystemExit(1)])
def test_a_failed_start_shows_the_end_of_what_was_kept(error, capsys):
    with pytest.raises(type(error)):
        start([f"line {number}" for number in range(SHOWN_LINES + 1)], error)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines()[1:] == [f"line {n}" for n in range(1, SHOWN_LINES + 1)]


@pytest.mark.parametrize("error", [ConfigError("--flag 1 is wrong"), SystemExit(0)])
def test_a_refused_start_shows_no_more_than_its_paragraph(error, capsys):
    with pytest.raises(type(error)):
        start(["a line"], error)
    assert capsys.readouterr() == ("", "")


def test_a_file_that_cannot_be_written_does_not_end_the_start(tmp_path):
    (tmp_path / "file").touch()
    with StartLog(verbose=False) as log:
        log.write_to(tmp_path / "file" / "start.log")
        print("goes on")
    assert start_log_path(None, None) is None


def start_lines(text: str) -> list[str]:
    lines = text.splitlines()
    return lines[: next(n for n, line in enumerate(lines) if FIRST_STEP in line)]


@pytest.mark.slow
def test_few_lines_come_before_the_first_step(tiny_dataset, tmp_path):
    """All that two processes write to the terminal, warnings of imports included, with the demo's model.

    The length is written as the README says; Megatron would parse the command line once more.
    """
    flags = ["-m", "megatron_long.pretrain", "--recipe", "tiny_debug", "--dataset", tiny_dataset]
    flags += [
        "--seq-length",
        "1K",
        "--global-batch-size",
        2,
        "--train-iters",
        1,
        "--save",
        tmp_path / "out",
    ]
    flags += ["--context-parallel-size", 2, "--allow-repeat"]
    command = [
        sys.executable,
        "-m",
        "megatron_long.launch",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    result = subprocess.run(
        [*command, *map(str, flags)],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    shown = start_lines(result.stdout)
    print(f"{len(shown)} lines", *shown, sep="\n")
    assert len(shown) <= MOST_LINES
    assert any(line.startswith("steps: 1 of 2 windows (2,048 tokens)") for line in shown)
    kept = (tmp_path / "out" / "logs" / "start.log").read_text()
    assert "  tensor_model_parallel_size " in kept
    assert FIRST_STEP not in kept


@pytest.mark.slow
def test_verbose_shows_it(jobs, tmp_path):
    job = jobs.run(1, "--train-iters", 1, "--verbose", "--save", tmp_path)
    assert "  tensor_model_parallel_size " in "\n".join(start_lines(job.text))
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_each_logged_loss_is_that_of_its_own_steps(jobs, read_log, tmp_path):
    """Megatron kept the first step of a start in the next line: of two steps, or after a resume of two."""
    flags = ("--save", tmp_path, "--train-iters", 4, "--loss-log", tmp_path / "log.jsonl")
    text = (
        jobs.run(1, *flags, "--exit-interval", 2).text
        + jobs.run(1, *flags, "--load", tmp_path).text
    )
    lines = [line for line in text.splitlines() if " lm loss: " in line]
    logged = [float(line.split(" lm loss: ")[1].split()[0]) for line in lines]
    exact = [step["lm loss"] for step in read_log(tmp_path / "log.jsonl")]
    assert logged == [float(f"{loss:.6E}") for loss in exact]
    assert len(set(exact)) == 4
    whole = jobs.run(1, "--train-iters", 4, "--log-interval", 2).text
    lines = [line for line in whole.splitlines() if " lm loss: " in line]
    means = [float(line.split(" lm loss: ")[1].split()[0]) for line in lines]
    assert means == pytest.approx([exact[0], sum(exact[:2]) / 2, sum(exact[2:]) / 2], rel=1e-5)
