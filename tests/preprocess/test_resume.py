"""A run that is killed resumes and gives the same bytes; another command or a changed corpus is refused."""

import dataclasses
import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

from megatron_long.dataset.manifest import read_manifest, verify_files
from megatron_long.errors import ConfigError, DataError
from megatron_long.files import process_mark, remove_folder
from megatron_long.mixture.mixture import Mixture
from megatron_long.preprocess import preprocess as preprocess_module
from megatron_long.preprocess import workdir
from megatron_long.preprocess.preprocess import preprocess
from megatron_long.preprocess.preprocess_config import PreprocessConfig
from megatron_long.preprocess.stages import TokenizeStage, WriteStage, split_parts
from megatron_long.preprocess.workdir import only_run, open_work, sweep
from tests.corpus_fixtures import files_of

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_FILES = 12


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def parts(tmp_path, records, write_jsonl):
    """The records in a dozen files."""
    for index in range(NUM_FILES):
        write_jsonl(
            tmp_path / "in" / f"{index:02d}.jsonl.zst", records[index * 50 : index * 50 + 50]
        )
    return tmp_path / "in"


@pytest.fixture
def config(parts, model_file):
    mixture = Mixture(
        train_tokens=9000,
        long_threshold_tokens=300,
        short_keep_ratio=0.3,
        valid_tokens_per_source=1000,
    )
    return PreprocessConfig(
        inputs=[parts], tokenizer=model_file, mixture=mixture, engine="reference"
    )


def kill_after(monkeypatch, stage, count):
    """Let `count` items of a stage be done, and the next one start."""
    run, done = stage.run, []

    def limited(self, index):
        if len(done) == count:
            raise Killed
        run(self, index)
        done.append(index)

    monkeypatch.setattr(stage, "run", limited)
    return done


@pytest.mark.parametrize("stage", [TokenizeStage, WriteStage])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_what_is_done_is_not_done_again(stage, count, config, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess_module, "split_parts", lambda order: split_parts(order, 1000))
    with monkeypatch.context() as patch:
        total = len(run_all(patch, stage, config, tmp_path / "whole"))
    assert total > 6
    with monkeypatch.context() as patch:
        kill_after(patch, stage, count)
        with pytest.raises(Killed):
            preprocess(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        done = run_all(patch, stage, config, tmp_path / "out")
    assert len(done) == total - count
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def run_all(monkeypatch, stage, config, output):
    """Run to the end; give the items of a stage that were run."""
    done = kill_after(monkeypatch, stage, 10**6)
    preprocess(config, output)
    return done


def start(parts, model_file, output, log):
    words = {
        "--input": parts,
        "--tokenizer": model_file,
        "--engine": "reference",
        "--output": output,
        "--train-tokens": "9K",
        "--long-threshold": 300,
        "--short-keep-ratio": 0.3,
        "--valid-tokens-per-source": "1K",
        "--workers": 2,
    }
    command = [
        sys.executable,
        "tools/preprocess_mix.py",
        *(str(w) for p in words.items() for w in p),
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True
    )


@pytest.mark.slow
def test_sigkill_at_random_moments(config, parts, model_file, tmp_path):
    generator, kills = random.Random(3), 0
    with open(tmp_path / "log", "wb") as log:
        began = time.monotonic()
        assert start(parts, model_file, tmp_path / "whole", log).wait(200) == 0
        duration = time.monotonic() - began
        for _ in range(8):
            process = start(parts, model_file, tmp_path / "out", log)
            try:
                process.wait(duration * generator.uniform(0.3, 0.95))
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
        if not (tmp_path / "out").exists():
            assert start(parts, model_file, tmp_path / "out", log).wait(200) == 0
    assert kills > 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    verify_files(tmp_path / "out", read_manifest(tmp_path / "out"))
    assert not list(tmp_path.glob("out.work/**/*.tmp"))


def stop_early(config, output, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, TokenizeStage, 3)
        with pytest.raises(Killed):
            preprocess(config, output)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed: 0 before, 1 now"),
        ({"token_dtype": "int32"}, "token_dtype: auto before, int32 now"),
        ({"mixture": Mixture(train_tokens=8000)}, "mixture"),
    ],
)
def test_another_command_is_refused(changes, named, config, tmp_path, monkeypatch):
    stop_early(config, tmp_path / "out", monkeypatch)
    other = dataclasses.replace(config, **changes)
    with pytest.raises(ConfigError, match=f"unfinished work of another command .*{named}"):
        preprocess(other, tmp_path / "out")
    if "mixture" not in changes:
        forced = dataclasses.replace(other, force=True)
        assert preprocess(forced, tmp_path / "out").seed == other.seed


def test_workers_and_executors_are_no_part_of_the_command(config, tmp_path, monkeypatch):
    preprocess(config, tmp_path / "whole")
    stop_early(config, tmp_path / "out", monkeypatch)
    preprocess(dataclasses.replace(config, workers=2), tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def change_content(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_content, r"00\.jsonl\.zst is not what it was"),
        (lambda path: path.write_bytes(path.read_bytes() * 2), r"00\.jsonl\.zst is not what"),
        (lambda path: path.unlink(), r"00\.jsonl\.zst is gone"),
        (lambda path: path.with_name("new.jsonl").write_bytes(b"x"), r"new\.jsonl is new"),
    ],
)
def test_a_corpus_that_changed_is_refused(change, message, config, parts, tmp_path, monkeypatch):
    stop_early(config, tmp_path / "out", monkeypatch)
    change(parts / "00.jsonl.zst")
    with pytest.raises(DataError, match=f"the corpus changed since .*{message}"):
        preprocess(config, tmp_path / "out")


def test_a_corpus_that_was_touched_alone_is_the_same(config, parts, tmp_path, monkeypatch):
    stop_early(config, tmp_path / "out", monkeypatch)
    os.utime(parts / "00.jsonl.zst")
    preprocess(config, tmp_path / "out")
    # Of a file that is not yet read nothing is known but its time.
    stop_early(config, tmp_path / "again", monkeypatch)
    os.utime(parts / "11.jsonl.zst")
    with pytest.raises(DataError, match=r"11\.jsonl\.zst is not what it was"):
        preprocess(config, tmp_path / "again")


def test_a_corpus_that_changes_while_it_is_read(config, parts, tmp_path, monkeypatch):
    made = preprocess_module._write

    def change_then_write(*arguments):
        change_content(parts / "05.jsonl.zst")
        return made(*arguments)

    monkeypatch.setattr(preprocess_module, "_write", change_then_write)
    with pytest.raises(DataError, match=r"05\.jsonl\.zst changed while it was read"):
        preprocess(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_goes_while_the_run_works_is_named(workers, config, parts, tmp_path):
    """And put back, the run resumes."""
    gone = parts / f"{NUM_FILES - 1:02d}.jsonl.zst"
    content, time_ns = gone.read_bytes(), gone.stat().st_mtime_ns

    def remove(progress):
        if progress.stage == "prepare":
            gone.unlink(missing_ok=True)

    config = dataclasses.replace(config, workers=workers)
    with pytest.raises(DataError, match=rf"{gone} cannot be opened \(No such file"):
        preprocess(config, tmp_path / "out", remove)
    gone.write_bytes(content)
    os.utime(gone, ns=(time_ns, time_ns))
    preprocess(config, tmp_path / "out")


def test_two_runs_at_once_are_refused(config, tmp_path):
    with (
        only_run(tmp_path / "out.work"),
        pytest.raises(ConfigError, match="another run is working"),
    ):
        preprocess(config, tmp_path / "out")


def test_a_lock_that_was_removed_locks_nobody_out(tmp_path, monkeypatch):
    """The run that held it ended between opening and locking its file, and a third run has a new one."""
    flock = fcntl.flock

    def end_other(file, mode):
        (tmp_path / ".out.work.lock").unlink()
        flock(file, mode)

    with monkeypatch.context() as patch:
        patch.setattr(workdir.fcntl, "flock", end_other)
        with pytest.raises(ConfigError, match="another run"), only_run(tmp_path / "out.work"):
            pass
    with only_run(tmp_path / "out.work"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_another_run_made_meanwhile_is_kept(config, tmp_path, monkeypatch):
    output = tmp_path / "out"

    def make(*_args):
        (output / "results").mkdir(parents=True)

    with monkeypatch.context() as patch:  # one of the last things before the dataset is moved
        patch.setattr(preprocess_module, "check_unchanged", make)
        with pytest.raises(ConfigError, match="exists already"):
            preprocess(config, output)
    assert [path.name for path in output.iterdir()] == ["results"]
    assert (tmp_path / "out.work").exists()
    preprocess(dataclasses.replace(config, force=True), output)
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]


def test_leftovers_of_a_killed_process_are_removed(config, tmp_path, monkeypatch):
    stop_early(config, tmp_path / "out", monkeypatch)
    work = tmp_path / "out.work"
    (work / "tokens.0" / ".000007.123.tmp").mkdir()
    (work / "tokens.0" / ".000007.123.tmp" / "tokens.bin").write_bytes(b"half")
    (work / ".inputs.json.5.tmp").write_bytes(b"half")
    preprocess(dataclasses.replace(config, keep_work=True), tmp_path / "out")
    assert not [path for path in work.rglob(".*") if path.suffix == ".tmp"]
    assert len(orjson.loads((work / "inputs.json").read_bytes())) == NUM_FILES


def test_a_killed_run_takes_its_workers_along(parts, model_file, tmp_path):
    import psutil

    with open(tmp_path / "log", "wb") as log:
        process = start(parts, model_file, tmp_path / "out", log)
        children: list[psutil.Process] = []
        deadline = time.monotonic() + 60
        while len(children) < 2 and process.poll() is None and time.monotonic() < deadline:
            found = psutil.Process(process.pid).children(recursive=True)
            children = [child for child in found if "spawn_main" in " ".join(child.cmdline())]
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert psutil.wait_procs(children, timeout=30)[1] == []


def test_a_kill_while_work_is_removed_leaves_nothing_half(tmp_path, monkeypatch):
    """What is left has another name, and the next run in the same place takes it away."""
    work = tmp_path / "out.work"
    (work / "tokens.0").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(
            "shutil.rmtree", lambda path: None
        )  # as if killed before anything was deleted
        remove_folder(work)
    assert [path.name for path in tmp_path.iterdir()] == [f".out.work.{process_mark()}.tmp"]
    with only_run(work):
        sweep(work)  # another run is there
    assert [path.name for path in tmp_path.iterdir()] == [f".out.work.{process_mark()}.tmp"]
    open_work(work, {"seed": 1}, [], force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    work.rename(tmp_path / ".out.work.5.tmp")
    sweep(work)
    assert list(tmp_path.iterdir()) == []
