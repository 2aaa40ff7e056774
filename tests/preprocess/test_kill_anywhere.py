"""preprocess_mix killed with SIGKILL at twenty random moments: the same command then gives the same bytes.

The runs are forked from this process, so that the moments fall into the work and not into imports; the
command line with worker processes is killed in test_resume.py.
"""

import multiprocessing
import os
import random
import signal
import time

import pytest

from megatron_long.dataset.manifest import read_manifest, verify_files
from megatron_long.mixture.mixture import Mixture
from megatron_long.preprocess import preprocess as preprocess_module
from megatron_long.preprocess.preprocess import PreprocessConfig, preprocess
from megatron_long.preprocess.stages import split_parts
from tests.corpus_fixtures import files_of

KILLS = 20
fork = multiprocessing.get_context("fork")


@pytest.fixture
def config(tmp_path, records, write_jsonl, model_file, monkeypatch):
    """A dozen files and many parts, so that there is much to resume."""
    monkeypatch.setattr(preprocess_module, "split_parts", lambda order: split_parts(order, 700))
    for index in range(12):
        rows = records[index * 50 : index * 50 + 50]
        write_jsonl(tmp_path / "in" / f"{index:02d}.jsonl.zst", rows)
    mixture = Mixture(
        train_tokens=9000,
        long_threshold_tokens=300,
        short_keep_ratio=0.3,
        valid_tokens_per_source=1000,
    )
    return PreprocessConfig(
        inputs=[tmp_path / "in"], tokenizer=model_file, mixture=mixture, engine="reference"
    )


@pytest.mark.slow
def test_killed_at_twenty_random_moments(config, tmp_path):
    preprocess(config, tmp_path / "warm")  # imports and caches
    began = time.monotonic()
    preprocess(config, tmp_path / "whole")
    duration = time.monotonic() - began
    expected, generator = files_of(tmp_path / "whole"), random.Random(11)
    same = kills = left = 0
    for number in range(200):
        output = tmp_path / f"out{number}"
        process = fork.Process(target=preprocess, args=(config, output))
        process.start()
        time.sleep(duration * generator.random())
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode != -signal.SIGKILL:  # it had ended
            assert files_of(output) == expected
            continue
        kills += 1
        left += any(tmp_path.glob(f"out{number}.work/*"))
        preprocess(config, output)
        same += files_of(output) == expected
        verify_files(output, read_manifest(output))
        assert not (tmp_path / f"out{number}.work").exists()
        if kills == KILLS:
            break
    print(f"{same} of {kills} the same; {left} left work behind")
    assert (same, kills) == (KILLS, KILLS)
    assert left >= KILLS // 2
