"""Ctrl-C while preprocessing: nothing waits, and the message says that the work is kept."""

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.corpus_fixtures import files_of
from tests.launched import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


@contextlib.contextmanager
def started(words, environment=ENVIRONMENT):
    """A process in a session of its own, which leaves nothing behind."""
    command = [sys.executable, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, start_new_session=True, **pipes
    )
    try:
        yield run
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_message_says_that_the_command_resumes(
    workers, model_file, records, write_jsonl, tmp_path
):
    for index in range(12):
        write_jsonl(tmp_path / "in" / f"{index}.jsonl", records * 2)
    words = ["tools/preprocess_mix.py", "--input", tmp_path / "in", "--tokenizer", model_file]
    words += ["--train-tokens", "20K", "--valid-tokens-per-source", "1K", "--engine", "reference"]
    words += ["--strategy", "original", "--workers", workers]
    with started([*words, "--output", tmp_path / "out"]) as run:
        done = tmp_path / "out.work" / "tokens.0"
        wait_until(lambda: any(done.glob("0*")) or run.poll() is not None)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        stdout, stderr = run.communicate(timeout=300)
    assert run.returncode == 130, stderr
    assert stderr.endswith("interrupted; the same command resumes where it was\n")
    assert "Traceback" not in stderr
    assert stdout == ""
    for output in ("out", "whole"):
        with started([*words, "--output", tmp_path / output]) as again:
            again.communicate(timeout=300)
        assert again.returncode == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@dataclass(frozen=True)
class Endless:
    """A stage of items that never end."""

    work: Path
    name: str = "endless"

    def is_done(self, index):
        return False

    def run(self, index):
        (self.work / f"{index}").touch()
        while True:
            signal.pause()


RUN_ENDLESS = """
import sys
from pathlib import Path
from megatron_long.preprocess.executors import ExecutorOptions, run_stage
from tests.preprocess.test_interrupt import Endless

if __name__ == "__main__":
    run_stage(Endless(Path(sys.argv[1])), 2, ExecutorOptions(workers=2))
"""


def test_workers_do_not_finish_their_files_first(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(RUN_ENDLESS, encoding="utf-8")
    with started([script, tmp_path]) as run:
        wait_until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
        os.kill(run.pid, signal.SIGINT)  # to the run alone
        _, stderr = run.communicate(timeout=300)
    assert stderr.rstrip().endswith("KeyboardInterrupt")
