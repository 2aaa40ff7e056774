"""A run resumes only on the data that it was trained on; what differs is named."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_long import pretrain
from megatron_long.dataset.manifest import read_manifest, verify_files, write_manifest
from megatron_long.errors import ConfigError, DataError
from megatron_long.mixture.mixture import Mixture
from megatron_long.preprocess.preprocess import PreprocessConfig, preprocess
from tests.fake_checkpoints import write_fake_checkpoint
from tests.job_fixtures import FLAGS


@pytest.fixture(scope="module")
def run(jobs, tmp_path_factory) -> Path:
    """A checkpoint at step 2 of 20."""
    folder = tmp_path_factory.mktemp("run") / "ckpt"
    jobs.run(1, "--train-iters", 20, "--exit-interval", 2, "--save", folder)
    return folder


@pytest.fixture
def dataset(tiny_dataset, tmp_path) -> Path:
    """A copy of the dataset that `run` was trained on."""
    return shutil.copytree(tiny_dataset, tmp_path / "data")


@pytest.fixture(scope="module")
def other_dataset(tiny_corpus, tiny_tokenizer, tmp_path_factory) -> Path:
    """The same corpus, mixed with another seed and for fewer tokens."""
    folder = tmp_path_factory.mktemp("other") / "data"
    mixture = Mixture(
        train_tokens=14_000,
        long_threshold_tokens=128,
        short_keep_ratio=0.5,
        valid_tokens_per_source=1500,
        allow_repeat=10,
    )
    preprocess(
        PreprocessConfig(inputs=[tiny_corpus], tokenizer=tiny_tokenizer, mixture=mixture, seed=5),
        folder,
    )
    return folder


def start(run: Path, dataset: Path, *flags: object):
    argv = [*FLAGS, "--dataset", dataset, "--train-iters", 20, "--load", run, *flags]
    return pretrain.prepare([str(word) for word in argv])[2]


def test_the_same_data_elsewhere_are_the_same(run, dataset):
    assert start(run, dataset).iteration == 2


def test_another_dataset_is_refused_with_what_differs(run, other_dataset):
    with pytest.raises(ConfigError) as refused:
        start(run, other_dataset)
    message = str(refused.value)
    assert "iter_0000002 was trained on other data" in message
    assert "fingerprint of the dataset: " in message
    assert "training tokens: 16,000 before, 14,000 now" in message
    assert "seed of the mixture: 0 before, 5 now" in message
    assert "tokens by source: " in message
    assert "corpus" not in message  # which is the same
    assert start(run, other_dataset, "--allow-dataset-change").iteration == 2


@pytest.mark.parametrize("flags", [("--finetune",), ("--load", "base")], ids=["finetune", "load"])
def test_a_start_that_would_write_among_checkpoints_is_refused(flags, run, dataset, base, tmp_path):
    flags = [base if word == "base" else word for word in flags]
    message = rf"--save {run} holds checkpoints of a run up to step 2, .*give --load {run} without --finetune"
    with pytest.raises(ConfigError, match=message):
        start(run, dataset, *flags, "--save", run)
    assert start(run, dataset, *flags, "--save", tmp_path / "new").choice
    assert start(run, dataset, "--save", f"{run}/.").resumes
    write_fake_checkpoint(tmp_path / "converted", None)  # weights alone are no run
    assert not start(run, dataset, "--finetune", "--save", tmp_path / "converted").resumes


def test_another_sequence_length_is_refused(run, dataset):
    flags = ("--seq-length", 64)
    with pytest.raises(ConfigError, match=r"\(--seq-length: 128 before, 64 now\)"):
        start(run, dataset, *flags)
    assert start(run, dataset, *flags, "--allow-dataset-change").resumes
    assert not start(run, dataset, *flags, "--finetune").resumes


def test_masking_of_document_ends_is_part_of_it(run, dataset):
    with pytest.raises(ConfigError, match="--eod-mask-loss: false before, true now"):
        start(run, dataset, "--eod-mask-loss")


def test_masks_between_documents_are_part_of_it(run, dataset, tmp_path):
    masking = "--document-masking"
    with pytest.raises(ConfigError, match=r"\(--document-masking: false before, true now\)"):
        start(run, dataset, masking)
    assert start(run, dataset, masking, "--allow-dataset-change").resumes
    assert not start(run, dataset, masking, "--finetune").resumes
    earlier = shutil.copytree(run, tmp_path / "earlier")  # of a version that did not keep it
    facts = earlier / "iter_0000002" / "training.json"
    content = json.loads(facts.read_text())
    assert content["data"].pop("document_masking") is False
    facts.write_text(json.dumps(content))
    for path in earlier.rglob("hashes.json"):
        path.unlink()
    assert start(earlier, dataset, masking).resumes


def test_another_tokenizer_is_refused(run, dataset, tmp_path):
    """By the tokenizer next to the checkpoint; where that is gone, by what the checkpoint says."""
    manifest = read_manifest(dataset)
    tokenizer = replace(manifest.tokenizer, vocabulary_sha256="0" * 64)
    write_manifest(dataset, replace(manifest, tokenizer=tokenizer))
    with pytest.raises(ConfigError, match="the tokenizer of --load"):
        start(run, dataset)
    bare = shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer"))
    (bare / "hashes.json").unlink()
    with pytest.raises(ConfigError, match=r"vocabulary of its tokenizer: \w{64} before, 0{64} now"):
        start(bare, dataset)


def test_stock_data_in_place_of_the_dataset_are_refused(run):
    argv = [*FLAGS, "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "384"]
    with pytest.raises(
        ConfigError, match=r"fingerprint of the dataset: \w+\.{0,3} before, null now"
    ):
        pretrain.prepare([*argv, "--train-iters", "20", "--load", str(run)])


def test_changed_bytes_under_the_same_manifest_are_found(run, dataset):
    path = dataset / "train.bin"
    content = bytearray(path.read_bytes())
    content[random.Random(4).randrange(len(content))] ^= 1
    path.write_bytes(content)
    for flags in ((), ("--finetune",)):
        with pytest.raises(
            DataError, match=r"train\.bin is damaged: its hash differs from the manifest's"
        ):
            start(run, dataset, *flags)


@pytest.mark.parametrize("version", ["this", "earlier"])
def test_a_changed_byte_of_the_tokenizer_is_found(version, run, dataset):
    """Also where the vocabulary's hash is all that the manifest has of it."""
    manifest = read_manifest(dataset)
    assert set(manifest.tokenizer_files) == {"tokenizer/tokenizer.model"}
    if version == "earlier":
        write_manifest(dataset, replace(manifest, tokenizer_files={}))
        assert read_manifest(dataset).fingerprint == manifest.fingerprint
        assert start(run, dataset).iteration == 2
    path = dataset / "tokenizer" / "tokenizer.model"
    content = path.read_bytes()
    assert content.count(b"context") == 1
    path.write_bytes(content.replace(b"context", b"contexT"))
    earlier = "it is not the vocabulary of the manifest"
    words = "its hash differs from the manifest's" if version == "this" else earlier
    with pytest.raises(DataError, match=rf"tokenizer.* is damaged: {words}"):
        start(run, dataset)
    with pytest.raises(DataError, match=rf"tokenizer.* is damaged: {words}"):
        start(run, dataset, "--finetune")


def test_untouched_files_are_not_read_again(run, tiny_dataset, monkeypatch):
    """Hashing terabytes at each start would cost more than it gives; times of change tell."""
    from megatron_long.checkpoint import run_identity

    read = []
    monkeypatch.setattr(
        run_identity, "verify_files", lambda *args: (read.append(args), verify_files(*args))
    )
    start(run, tiny_dataset)
    assert read == []
    (tiny_dataset / "train.bin").touch()
    start(run, tiny_dataset)
    assert len(read) == 1


def test_checkpoint_says_what_it_was_trained_on(run, tiny_dataset):
    data = json.loads((run / "iter_0000002" / "training.json").read_text())["data"]
    assert data["dataset_fingerprint"] == read_manifest(tiny_dataset).fingerprint
    assert data["seq_length"] == 128


@pytest.mark.slow
def test_refusal_is_one_paragraph_and_status_2(run, other_dataset, jobs):
    flags = ("--dataset", other_dataset, "--train-iters", 20, "--load", run)
    job = jobs.run(2, *flags, status=2)
    assert "error: " in job.logs[0]
    assert "Traceback" not in job.text
    changed = (*flags, "--allow-dataset-change", "--exit-interval", 4)
    assert "iteration        3/      20" in jobs.run(2, *changed).text
