"""What the waiting run sees of the tasks, whoever runs them."""

import itertools

from megatron_long.corpus.listing import find_inputs
from megatron_long.mixture.mixture import Mixture
from megatron_long.preprocess import monitor as module
from megatron_long.preprocess.preprocess import preprocess
from megatron_long.preprocess.preprocess_config import PreprocessConfig
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
    last = seen[-1]
    sizes = sum(item.size_bytes for item in find_inputs([corpus]))
    assert (last.stage, last.files_done, last.files_total) == ("tokens.0", 3, 3)
    assert last.read_bytes == last.total_bytes == sizes
    assert last.text_bytes == sum(info.bytes_in for info in manifest.sources.values())
    assert last.tokens_by_source == {
        name: info.tokens_in for name, info in manifest.sources.items()
    }
    assert all(a.read_bytes <= b.read_bytes for a, b in itertools.pairwise(seen))


def test_files_under_way_are_seen(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_long.preprocess.stages.PROGRESS_SECONDS", 0.0)
    report = _reporter(tmp_path / "progress" / "tokens.0.000001.json")
    seen = []
    with module.Monitor(tmp_path, "tokens.0", find_inputs([corpus]), seen.append):
        report(FileProgress("a", 100, 300, 50, {"Book": 50}))
    assert (seen[-1].read_bytes, seen[-1].tokens, seen[-1].files_done) == (100, 50, 0)
    report(FileProgress("a", done=True))
    assert not list((tmp_path / "progress").iterdir())
