"""What users feed and where they write: each ends in one clear error, or is left out and listed."""

import dataclasses
import os
import subprocess

import numpy as np
import orjson
import pytest

from megatron_long.dataset.indexed import IndexedDatasetReader
from megatron_long.dataset.manifest import read_manifest
from megatron_long.errors import ConfigError, DataError
from megatron_long.mixture.mixture import Mixture
from megatron_long.preprocess.preprocess import preprocess
from megatron_long.preprocess.preprocess_config import PreprocessConfig
from megatron_long.preprocess.tokenize_file import _check_ids
from megatron_long.tokenizer.loading import load_tokenizer

MIXTURE = Mixture(train_tokens=2000, strategy="original", valid_tokens_per_source=500)


@pytest.fixture
def config(tmp_path, model_file):
    return PreprocessConfig(
        inputs=[tmp_path / "in"], tokenizer=model_file, mixture=MIXTURE, engine="reference"
    )


def skipping(config):
    return dataclasses.replace(config, on_bad_document="skip")


def lines_of(records):
    return b"".join(orjson.dumps(record) + b"\n" for record in records)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x\xff\xfe", "source": "s"}', "is not JSON"),
        (b'{"text": "a\x00b", "source": "s"}', "is not JSON"),
        (b"\x00" * 4096, "is not JSON"),
        (b'{"text": "x", "source": "s"', "is not JSON"),
        (b'{"source": "s"}', "has no text string"),
        (b'{"text": "x"}', "has no source string"),
        (b'{"text": "x", "source": "' + b"s" * 201 + b'"}', "has a source label too long"),
        (('{"text": "x", "source": "' + "é" * 40 + '"}').encode(), "has a source label too long"),
    ],
)
def test_bad_lines_stop_or_are_listed(line, reason, config, tmp_path, records):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.jsonl"
    path.write_bytes(lines_of(records[:100]) + line + b"\n" + lines_of(records[100:]))
    with pytest.raises(DataError, match=rf"a\.jsonl:101 {reason}.*--on-bad-document skip"):
        preprocess(config, tmp_path / "out")
    manifest = preprocess(skipping(config), tmp_path / "out")  # what the message says
    assert manifest.documents_bad == manifest.inputs[0].num_bad == 1
    assert manifest.bad_documents[0]["file"] == "a.jsonl"
    assert manifest.bad_documents[0]["line"] == 101
    assert manifest.bad_documents[0]["reason"].startswith(reason)
    assert sum(info.documents_in for info in manifest.sources.values()) == len(records)
    assert read_manifest(tmp_path / "out") == manifest


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_files_stop_or_are_listed(suffix, config, tmp_path, records, write_jsonl):
    path = write_jsonl(tmp_path / "in" / f"a.jsonl{suffix}", records)
    write_jsonl(tmp_path / "in" / "b.jsonl", records[:50])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"a\.jsonl{suffix}:\d+ cannot be read .*cut off"):
        preprocess(config, tmp_path / "out")
    manifest = preprocess(skipping(config), tmp_path / "skipped")
    assert manifest.documents_bad == 1
    assert "cut off" in manifest.bad_documents[0]["reason"]
    assert 0 < manifest.inputs[0].num_documents < 600
    assert manifest.inputs[1].num_documents == 50


def test_many_bad_lines_are_counted_and_the_first_listed(config, tmp_path, records):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(b"{}\n" * 5000 + lines_of(records))
    manifest = preprocess(skipping(config), tmp_path / "out")
    assert manifest.documents_bad == 5000
    assert [bad["line"] for bad in manifest.bad_documents] == list(range(1, 21))


def test_texts_without_tokens_are_counted_and_left_out(config, tmp_path, records, write_jsonl):
    empty = [{"text": "", "source": "Book"}] * 7
    write_jsonl(tmp_path / "in" / "a.jsonl", [*records, *empty])
    manifest = preprocess(config, tmp_path / "out")
    assert manifest.documents_empty == 7
    assert IndexedDatasetReader(tmp_path / "out" / "train").lengths.min() > 2


def test_a_line_of_100_megabytes_is_one_document(config, tmp_path, records, write_jsonl):
    long = {"text": "bocu " * 20_000_000, "source": "Big"}
    write_jsonl(tmp_path / "in" / "a.jsonl", [*records, long])
    shares = {"Book": 1.0, "C4": 1.0, "GitHub": 1.0, "Big": 97.0}
    mixture = dataclasses.replace(MIXTURE, train_tokens=4_000_000, source_shares=shares)
    mixture = dataclasses.replace(mixture, allow_repeat=20, valid_tokens_per_source=0)
    preprocess(dataclasses.replace(config, mixture=mixture, engine="auto"), tmp_path / "out")
    reader = IndexedDatasetReader(tmp_path / "out" / "train")
    assert reader.lengths.max() == round(0.97 * 4_000_000)


def test_nul_characters_written_as_escapes_survive(config, tmp_path, write_jsonl, model_file):
    texts = [f"bocu{index} a\x00b" for index in range(400)]
    write_jsonl(tmp_path / "in" / "a.jsonl", ({"text": text, "source": "s"} for text in texts))
    preprocess(config, tmp_path / "out")
    reader, tokenizer = IndexedDatasetReader(tmp_path / "out" / "train"), load_tokenizer(model_file)
    assert tokenizer.decode(reader.read(0)[1:-1]) in texts


def test_a_source_without_a_share_is_found_at_its_first_document(
    config, tmp_path, records, write_jsonl
):
    write_jsonl(tmp_path / "in" / "a.jsonl", [*records, {"text": "x", "source": "Patents"}])
    shares = {"Book": 1.0, "C4": 1.0, "GitHub": 1.0}
    mixture = dataclasses.replace(MIXTURE, source_shares=shares)
    for on_bad in ("stop", "skip"):
        changed = dataclasses.replace(config, mixture=mixture, on_bad_document=on_bad, force=True)
        with pytest.raises(DataError, match=r"a\.jsonl:601 is of source Patents.* no share to it"):
            preprocess(changed, tmp_path / "out")


def test_a_tokenizer_larger_than_the_dtype(config, tmp_path, corpus, model_file):
    from megatron_long.preprocess.preprocess_config import choose_dtype

    with pytest.raises(ConfigError, match=r"--token-dtype uint16 is too small .* 128,256 ids"):
        choose_dtype("uint16", 128_256)
    assert choose_dtype("auto", 128_256) == np.int32
    wide = dataclasses.replace(config, inputs=[corpus], token_dtype="int32")
    preprocess(wide, tmp_path / "wide")
    preprocess(dataclasses.replace(wide, token_dtype="uint16"), tmp_path / "narrow")
    readers = [IndexedDatasetReader(tmp_path / name / "train") for name in ("wide", "narrow")]
    assert [reader.dtype for reader in readers] == [np.int32, np.uint16]
    assert (readers[0].read_span(0, 2000) == readers[1].read_span(0, 2000)).all()


def test_ids_beyond_the_vocabulary_are_never_stored(model_file):
    ids, vocab_size = np.array([3, 65540], np.int32), load_tokenizer(model_file).vocab_size
    with pytest.raises(DataError, match=r"a\.jsonl: the tokenizer gives the id 65540"):
        _check_ids(ids, np.array([2]), vocab_size, "a.jsonl", np.array([1]))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_names_the_remedy_and_the_run_goes_on(
    workers, config, tmp_path, records, write_jsonl, small_disk
):
    for index in range(6):
        write_jsonl(tmp_path / "in" / f"{index}.jsonl", records)
    config = dataclasses.replace(
        config, workers=workers, mixture=dataclasses.replace(MIXTURE, train_tokens=50_000)
    )
    preprocess(config, tmp_path / "whole")
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * (800 << 10))
    with pytest.raises(ConfigError, match=r"no space left .* make room and give the same command"):
        preprocess(config, small_disk / "out")
    assert not (small_disk / "out").exists()
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    preprocess(config, small_disk / "out")
    ours = (small_disk / "out" / "train.bin").read_bytes()
    assert ours == (tmp_path / "whole" / "train.bin").read_bytes()


def test_an_output_that_cannot_be_written(config, tmp_path, corpus, small_disk):
    config = dataclasses.replace(config, inputs=[corpus])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    read_only = f"{small_disk} is not a folder that can be written"
    with pytest.raises(ConfigError, match=read_only):
        preprocess(config, small_disk / "out")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="file is not a folder that can be written"):
        preprocess(config, tmp_path / "file" / "out")
