import hashlib
import json
import shutil

import pytest

from megatron_long.dataset.inspection import DatasetBrowser
from megatron_long.dataset.manifest import read_manifest, verify_files
from megatron_long.dataset.verification import verify_dataset
from megatron_long.errors import DataError
from megatron_long.mixture.mixture import Mixture
from megatron_long.preprocess.preprocess import preprocess
from megatron_long.preprocess.preprocess_config import PreprocessConfig


@pytest.fixture(scope="module")
def made(corpus, model_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("manifest") / "out"
    mixture = Mixture(train_tokens=2000, strategy="original", valid_tokens_per_source=500)
    preprocess(PreprocessConfig(inputs=[corpus], tokenizer=model_file, mixture=mixture), output)
    return output


@pytest.fixture
def dataset(made, tmp_path):
    return shutil.copytree(made, tmp_path / "out")


def change(dataset, edit):
    path = dataset / "manifest.json"
    content = json.loads(path.read_text("utf-8"))
    edit(content)
    path.write_text(json.dumps(content), "utf-8")


def test_reading_gives_what_was_written(dataset):
    manifest = read_manifest(dataset)
    content = json.loads((dataset / "manifest.json").read_text("utf-8"))
    assert manifest.fingerprint == content["fingerprint"]
    assert manifest.tokenizer.vocab_size == 500
    assert manifest.valid["Book"].prefix == "valid/Book"


def test_absent_and_damaged_manifests(dataset, tmp_path):
    with pytest.raises(DataError, match=r"is not a dataset: it has no manifest\.json"):
        read_manifest(tmp_path)
    for content in ("", "{", "[]", "{}", '{"format_version": 1, "fingerprint": ""}'):
        (dataset / "manifest.json").write_text(content, "utf-8")
        with pytest.raises(DataError, match="is damaged"):
            read_manifest(dataset)
    (dataset / "manifest.json").write_bytes(b"\xff" * 10_000)
    with pytest.raises(DataError, match="is damaged") as caught:
        read_manifest(dataset)
    assert len(str(caught.value)) < 1_000


def test_edited_manifest_and_other_version(dataset):
    change(dataset, lambda content: content["train"].update(num_tokens=1))
    with pytest.raises(DataError, match="was changed after it was written"):
        read_manifest(dataset)
    change(dataset, lambda content: content.update(format_version=9))
    with pytest.raises(DataError, match="format version 9; this program reads 1"):
        read_manifest(dataset)


def test_missing_short_and_damaged_files(dataset):
    manifest, path = read_manifest(dataset), dataset / "train.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"\x01\x00")
    with pytest.raises(DataError, match=r"train\.bin is damaged"):
        verify_files(dataset, manifest)
    path.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"train\.bin has 3,998 bytes, .* 4,000"):
        read_manifest(dataset)
    path.unlink()
    with pytest.raises(DataError, match=r"train\.bin is missing"):
        read_manifest(dataset)


FIRST_RELEASE = {
    "manifest": "format_version seed mixture tokenizer dtype train valid sources inputs fingerprint",
    "sources": "index share_asked share_got documents_in tokens_in documents_valid tokens_valid "
    "documents_kept tokens_kept long_share_before long_share_after tokens_by_length_before "
    "tokens_by_length_after",
    "inputs": "name size_bytes num_documents",
}


def as_first_release(dataset):
    """Make a dataset what the first release would have written: fewer keys, no rows of held-out documents."""
    content = json.loads((dataset / "manifest.json").read_text("utf-8"))
    content = {key: content[key] for key in FIRST_RELEASE["manifest"].split()}
    kept = FIRST_RELEASE["sources"].split()
    content["sources"] = {
        name: {key: info[key] for key in kept} for name, info in content["sources"].items()
    }
    kept = FIRST_RELEASE["inputs"].split()
    content["inputs"] = [{key: info[key] for key in kept} for info in content["inputs"]]
    for split in content["valid"].values():
        (dataset / f"{split['prefix']}.documents.npy").unlink()
        split["files"].pop(f"{split['prefix']}.documents.npy")
    del content["fingerprint"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    content["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()
    (dataset / "manifest.json").write_text(json.dumps(content), "utf-8")


def test_datasets_of_the_first_release_stay_readable(dataset):
    as_first_release(dataset)
    manifest = read_manifest(dataset)
    assert manifest.order is None
    assert manifest.inputs[0].xxh3_128 == ""
    assert len(list(verify_dataset(dataset))) == 5
    assert DatasetBrowser(dataset, "Book").place(0) == "held out"
