"""What the waiting run sees of the tasks, whoever runs them."""

import dataclasses
import itertools

import orjson
import pytest

from megatron_long.corpus.listing import find_inputs
from megatron_long.mixture.mixture import Mixture
from megatron_long.preprocess import monitor as module
from megatron_long.preprocess.monitor import RunProgress
from megatron_long.preprocess.preprocess import preprocess
from megatron_long.preprocess.preprocess_config import PreprocessConfig
from megatron_long.preprocess.progress_bar import describe
from megatron_long.preprocess.stages import _reporter
from megatron_long.preprocess.tokenize_file import FileProgress


def test_progress_adds_up_to_the_corpus(corpus, model_file, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    mixture = Mixture(train_tokens=4000, strategy="original", valid_tokens_per_source=100)
    config = PreprocessConfig(
        inputs=[corpus], tokenizer=model_file, mixture=mixture, engine="reference"
    )
    seen = []
    manifest = preprocess(config, tmp_path / "out", seen.append)
    stages = [progress.stage for progress in seen]
    names = ["prepare", "tokens.0", "plan", "write", "finish"]
    assert list(dict.fromkeys(stages)) == names
    ends = [progress for progress in seen if progress.is_finished]
    assert [progress.stage for progress in ends] == names
    last = ends[1]
    sizes = sum(item.size_bytes for item in find_inputs([corpus]))
    assert (last.stage, last.files_done, last.files_total) == ("tokens.0", 3, 3)
    assert last.read_bytes == last.total_bytes == sizes
    assert last.text_bytes == sum(info.bytes_in for info in manifest.sources.values())
    assert last.tokens_by_source == {
        name: info.tokens_in for name, info in manifest.sources.items()
    }
    tokenizing = [progress for progress in seen if progress.stage == "tokens.0"]
    assert all(a.read_bytes <= b.read_bytes for a, b in itertools.pairwise(tokenizing))
    assert (ends[3].files_done, ends[3].files_total) == (1, 1)
    assert last.resumed_tokens == 0


class Clock:
    """Time that a test moves."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


class Work:
    """A stage of 1,000 bytes, 400 of which another run has done."""

    done = 400

    def __call__(self):
        made = {"Book": self.done * 10}
        return RunProgress("", 0, 4, self.done, 1000, self.done, sum(made.values()), made)


def test_the_time_left_is_that_of_a_steady_run(monkeypatch):
    """From 8 s on, 20 bytes a second: what is told is the truth, or nothing."""
    monkeypatch.setattr(module, "POLL_SECONDS", 1e6)
    clock, work, seen = Clock(monkeypatch), Work(), []
    with module.Monitor("tokens.0", seen.append, work) as monitor:
        for second in range(1, 38):
            clock.now = 1000.0 + second
            work.done = 400 + 20 * max(second - 8, 0)
            monitor._tell()
    told = {round(progress.seconds): progress.left_s for progress in seen}
    assert all(told[second] is None for second in range(1, 14))
    for second in range(14, 37):
        assert told[second] == pytest.approx(38 - second)
    assert {progress.resumed_tokens for progress in seen} == {4000}
    line = describe(seen[19])  # 20 s: 240 bytes, 2,400 tokens of this run
    assert line == (
        "tokens.0: 0 of 4 files, 0.0 of 0.0 MB, 120 tokens/s, 20 s so far, about 18 s left"
    )


def test_tokens_of_another_run_are_not_this_runs_speed():
    made = {"Book": 6_000_000, "C4": 4_000_000}
    progress = RunProgress("tokens.0", 1, 4, 10, 40, 30, 10_000_000, made, seconds=2.0)
    assert "5.00M tokens/s" in describe(progress)
    resumed = dataclasses.replace(progress, resumed_tokens_by_source={"Book": 6_000_000})
    assert "2.00M tokens/s" in describe(resumed)
    kept = dataclasses.replace(progress, resumed_tokens_by_source=made)
    assert ", 10.0M tokens of an earlier run, " in describe(kept)


def test_a_resumed_run_counts_what_was_done_and_forgets_what_was_not(corpus, tmp_path):
    """A file that was under way when the run was killed starts again."""
    left = tmp_path / "progress" / "tokens.0.000001.json"
    left.parent.mkdir()
    left.write_bytes(orjson.dumps(dataclasses.asdict(FileProgress("b", 100, 300, 50, {"C4": 50}))))
    look = module.TokenizeLook(tmp_path, "tokens.0", find_inputs([corpus]))
    assert look().read_bytes == look().tokens == 0


def test_files_under_way_are_seen(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_long.preprocess.stages.PROGRESS_SECONDS", 0.0)
    report = _reporter(tmp_path / "progress" / "tokens.0.000001.json")
    seen = []
    look = module.TokenizeLook(tmp_path, "tokens.0", find_inputs([corpus]))
    with module.Monitor("tokens.0", seen.append, look):
        report(FileProgress("a", 100, 300, 50, {"Book": 50}))
    assert (seen[-1].read_bytes, seen[-1].tokens, seen[-1].files_done) == (100, 50, 0)
    report(FileProgress("a", done=True))
    assert not list((tmp_path / "progress").iterdir())
