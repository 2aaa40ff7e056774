"""A disk that is full, at every stage: one clear message, and the same command resumes."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_long.errors import ConfigError, DataError
from megatron_long.mixture.mixture import Mixture
from megatron_long.preprocess.executors import ClusterStep, _raise_errors
from megatron_long.preprocess.preprocess import preprocess
from megatron_long.preprocess.preprocess_config import PreprocessConfig
from megatron_long.preprocess.publish import publish
from tests.corpus_fixtures import files_of

REPOSITORY = Path(__file__).resolve().parents[2]
NAMESPACE = ("unshare", "--map-root-user", "--user", "--mount")
GROWING_DISK = """
mount -t tmpfs -o size=100k none "$DISK"
for ((size = 100; size < 20000; size += $STEP)); do
  mount -o remount,size=${size}k "$DISK"
  "$@" > "$DISK.log" 2>&1; status=$?
  cat "$DISK.log"; echo "exit status $status"
  [ $status = 2 ] || break
done
cp -r "$DISK/out" "$DISK.out"
"""


def can_mount() -> bool:
    if not shutil.which("unshare"):
        return False
    command = [*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="no right to mount a small file system")


def words_of(corpus, model_file, output):
    words = ["--input", corpus, "--tokenizer", model_file, "--output", output]
    words += ["--strategy", "original", "--train-tokens", "150K", "--allow-repeat", "3"]
    return [*map(str, words), "--valid-tokens-per-source", "1K", "--engine", "reference"]


@pytest.mark.slow
@needs_mount
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_disk_that_grows_while_the_command_is_repeated(workers, corpus, model_file, tmp_path):
    disk, tool = tmp_path / "disk", [sys.executable, "tools/preprocess_mix.py"]
    disk.mkdir()
    words = [*words_of(corpus, model_file, disk / "out"), "--workers", workers]
    environment = {**os.environ, "DISK": str(disk), "STEP": "60", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [*NAMESPACE, "bash", "-c", GROWING_DISK, "bash", *tool, *words],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    *failed, _ = result.stdout.split("exit status ")[:-1]
    assert len(failed) > 5
    told = [" ".join(one.split()) for one in failed]
    remedy = "make room and give the same command again, which resumes where it was"
    assert all("no space left" in one and one.endswith(remedy) for one in told)
    assert "Traceback" not in result.stdout
    whole = subprocess.run(
        [*tool, *words_of(corpus, model_file, tmp_path / "whole")], cwd=REPOSITORY
    )
    assert whole.returncode == 0
    assert files_of(tmp_path / "disk.out") == files_of(tmp_path / "whole")


def test_a_limit_of_file_sizes_is_named(corpus, model_file, tmp_path):
    mixture = Mixture(train_tokens=60_000, strategy="original", valid_tokens_per_source=1000)
    config = PreprocessConfig(
        inputs=[corpus], tokenizer=model_file, mixture=mixture, engine="reference"
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ConfigError, match=r"no file may grow that large .*same command again"):
            preprocess(config, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "out.work" / "tokens.0").is_dir()
    preprocess(config, tmp_path / "out")


@dataclass
class FullDisk:
    """A stage whose items meet a full disk."""

    work: Path
    name: str = "tokens.0"

    def is_done(self, index):
        return False

    def run(self, index):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_task_of_a_cluster_tells_the_cause(tmp_path):
    step = ClusterStep(FullDisk(tmp_path), [3], tmp_path / "errors")
    with pytest.raises(ConfigError, match="no space left"):
        step(None)
    with pytest.raises(DataError, match=r"no space left .* make room"):
        _raise_errors(tmp_path / "errors")


COPY_TO_FULL_DISK = """
mount -t tmpfs -o size=100k none "$1"
"$2" -c 'import sys
from pathlib import Path
from megatron_long.preprocess.publish import disk_errors, publish
with disk_errors(Path(sys.argv[1])):
    publish(Path(sys.argv[2]), Path(sys.argv[1]) / "out", Path(sys.argv[1]))' "$1" "$3"
ls -A "$1"
"""


@needs_mount
def test_a_copy_to_a_full_disk_tells_the_cause(tmp_path):
    """As from a --work-dir on another file system."""
    made, disk = tmp_path / "dataset", tmp_path / "disk"
    (made / "valid").mkdir(parents=True)
    disk.mkdir()
    (made / "train.bin").write_bytes(b"x" * 200_000)
    (made / "valid" / "a.bin").write_bytes(b"y")
    words = ["bash", "-c", COPY_TO_FULL_DISK, "bash", str(disk), sys.executable, str(made)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([*NAMESPACE, *words], env=environment, capture_output=True, text=True)
    error = result.stderr.splitlines()[-1]
    assert f"ConfigError: {disk}/" in error
    assert "train.bin: no space left (No space left on device)" in error
    assert result.stdout == ""
    publish(made, tmp_path / "out", tmp_path)
    assert files_of(tmp_path / "out").keys() == {"train.bin", "valid/a.bin"}
