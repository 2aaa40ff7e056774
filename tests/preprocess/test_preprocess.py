import dataclasses
import json
import re

import numpy as np
import pytest

from megatron_long.corpus.documents import RecordKeys
from megatron_long.dataset.indexed import IndexedDatasetReader
from megatron_long.dataset.inspection import DatasetBrowser
from megatron_long.dataset.manifest import read_manifest, verify_files
from megatron_long.dataset.verification import verify_dataset
from megatron_long.errors import ConfigError, DataError
from megatron_long.mixture.keys import batch_keys
from megatron_long.mixture.mixture import Mixture
from megatron_long.preprocess import stages
from megatron_long.preprocess.dry_run import plan_dataset
from megatron_long.preprocess.preprocess import preprocess
from megatron_long.preprocess.preprocess_config import PreprocessConfig
from megatron_long.tokenizer.loading import load_tokenizer
from tests.corpus_fixtures import files_of

TRAIN_TOKENS = 9000


@pytest.fixture(scope="session")
def config(corpus, model_file):
    mixture = Mixture(
        train_tokens=TRAIN_TOKENS,
        long_threshold_tokens=300,
        short_keep_ratio=0.3,
        valid_tokens_per_source=2000,
    )
    return PreprocessConfig(inputs=[corpus], tokenizer=model_file, mixture=mixture)


@pytest.fixture(scope="session")
def dataset(config, tmp_path_factory):
    output = tmp_path_factory.mktemp("dataset") / "out"
    preprocess(config, output)
    return output


def sentences(folder, prefix, tokenizer):
    reader = IndexedDatasetReader(folder / prefix)
    return [tokenizer.decode(reader.read(i)[1:-1]) for i in range(len(reader))]


def test_folder_is_as_documented(dataset):
    manifest = read_manifest(dataset)
    verify_files(dataset, manifest)
    assert sorted(files_of(dataset)) == sorted(
        [
            *("train.bin", "train.idx", "documents.npy", "manifest.json"),
            "tokenizer/tokenizer.model",
            "report/index.html",
            "report/lengths_and_sources.png",
            *(
                f"valid/{name}.{end}"
                for name in ("Book", "C4", "GitHub")
                for end in ("bin", "idx", "documents.npy")
            ),
        ]
    )
    assert not list(dataset.parent.glob(".*"))
    assert manifest.source_names == ["Book", "C4", "GitHub"]
    assert [item.name for item in manifest.inputs] == [
        "a.jsonl",
        "sub/b.jsonl.gz",
        "sub/c.jsonl.zst",
    ]


def test_every_document_is_the_one_its_row_points_at(dataset, config, corpus, records):
    manifest, tokenizer = read_manifest(dataset), load_tokenizer(dataset / "tokenizer")
    reader = IndexedDatasetReader(dataset / "train")
    rows = np.load(dataset / "documents.npy")
    assert reader.num_tokens == manifest.train.num_tokens == TRAIN_TOKENS
    assert len(rows) == len(reader) == manifest.train.num_documents
    np.testing.assert_array_equal(rows["length_tokens"], reader.lengths)
    first_record, cut = (0, 250, 400), 0
    for index, row in enumerate(rows):
        record = records[first_record[row["file"]] + int(row["line"]) - 1]
        expected = [tokenizer.bos_id, *tokenizer.encode(record["text"]).tolist(), tokenizer.eod_id]
        tokens = reader.read(index).tolist()
        assert tokens[-1] == tokenizer.eod_id
        assert tokens[:-1] == expected[: len(tokens) - 1]
        cut += len(tokens) < len(expected)
        label = record["meta"]["redpajama_set_name"].removeprefix("RedPajama")
        assert manifest.source_names[row["source"]].lower() == label.lower()
    assert cut <= 3


def test_held_out_documents_are_whole_and_not_in_training(dataset, records):
    manifest, tokenizer = read_manifest(dataset), load_tokenizer(dataset / "tokenizer")
    texts = {record["text"] for record in records}
    trained = {text.partition(" ")[0] for text in sentences(dataset, "train", tokenizer)}
    for split in manifest.valid.values():
        held_out = sentences(dataset, split.prefix, tokenizer)
        assert len(held_out) == split.num_documents > 0
        assert set(held_out) <= texts
        assert not {text.partition(" ")[0] for text in held_out} & trained


def test_documents_as_they_are_are_counted_to_the_token(config, tmp_path):
    mixture = dataclasses.replace(config.mixture, short_share=0.66, short_keep_ratio=0.0)
    output = tmp_path / "out"
    preprocess(dataclasses.replace(config, mixture=mixture), output)
    manifest = read_manifest(output)
    plain = sum(info.tokens_plain for info in manifest.sources.values())
    assert plain == round(0.66 * TRAIN_TOKENS) == 5940
    assert manifest.mixture["short_share"] == 0.66
    # What is not as it is, is long; a document that the budget cuts may have become short.
    lengths = IndexedDatasetReader(output / "train").lengths.astype(int)
    assert lengths.sum() == TRAIN_TOKENS
    others = TRAIN_TOKENS - plain
    cut = 300 * len(manifest.sources)
    assert lengths[lengths >= 300].sum() >= others - cut
    page = (output / "report" / "index.html").read_text()
    assert "with 5,940 tokens in documents as they are, seed 0" in page
    assert "<th>tokens as they are</th>" in page


def test_a_separator_replaces_bos_and_eod(config, dataset, tmp_path):
    changed = dataclasses.replace(config, document_separator="<s>", workers=2)
    preprocess(changed, tmp_path / "out")
    manifest, before = read_manifest(tmp_path / "out"), read_manifest(dataset)
    assert manifest.tokenizer.bos_id is None
    assert manifest.tokenizer.eod_id == before.tokenizer.bos_id != before.tokenizer.eod_id
    assert list(verify_dataset(tmp_path / "out"))
    reader = IndexedDatasetReader(tmp_path / "out" / "train")
    assert reader.num_tokens == TRAIN_TOKENS
    tokenizer, browser = load_tokenizer(config.tokenizer), DatasetBrowser(tmp_path / "out")
    rows = np.load(tmp_path / "out" / "documents.npy")
    for index, row in enumerate(rows):
        tokens = reader.read(index).tolist()
        assert tokens.count(manifest.tokenizer.eod_id) == 1
        assert tokens[-1] == manifest.tokenizer.eod_id
        assert before.tokenizer.eod_id not in tokens
        assert row["length_tokens"] == len(tokens)
        assert browser.decode(reader.read(index)) == tokenizer.decode(tokens[:-1])


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_change_no_byte(workers, dataset, config, tmp_path):
    preprocess(dataclasses.replace(config, workers=workers), tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(dataset)


def test_one_process_opens_its_tokenizer_once(dataset, config, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "load_tokenizer", lambda path, engine: pytest.fail("opened again"))
    preprocess(config, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(dataset)
    assert not stages._TOKENIZERS  # nothing is left in memory


def test_keys_are_uniform_and_independent():
    keys = batch_keys(0, "a.jsonl", range(1, 5001)) / 2.0**64
    np.testing.assert_allclose(keys.mean(axis=0), 0.5, atol=0.02)
    assert abs(np.corrcoef(keys.T)[0, 1]) < 0.05
    files = [(0, "a.jsonl"), (1, "a.jsonl"), (0, "b.jsonl")]
    assert len({tuple(batch_keys(seed, name, [1])[0]) for seed, name in files}) == 3


def test_seed_changes_the_sample_and_its_order(dataset, config, tmp_path):
    preprocess(dataclasses.replace(config, seed=1), tmp_path / "out")
    assert (tmp_path / "out" / "train.bin").read_bytes() != (dataset / "train.bin").read_bytes()
    assert read_manifest(tmp_path / "out").fingerprint != read_manifest(dataset).fingerprint


def test_moved_corpus_gives_the_same_bytes(dataset, config, corpus, tmp_path):
    (tmp_path / "elsewhere").symlink_to(corpus)
    preprocess(dataclasses.replace(config, inputs=[tmp_path / "elsewhere"]), tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(dataset)


def test_plan_is_what_is_written(dataset, config):
    assert plan_dataset(config).planned == read_manifest(dataset).sources


def test_odd_source_labels_get_safe_file_names(config, tmp_path, write_jsonl):
    labels = ("web/en", "..", "日本")
    file = write_jsonl(
        tmp_path / "a.jsonl",
        ({"text": f"bocu {i}", "source": labels[i % 3]} for i in range(60)),
    )
    changed = dataclasses.replace(
        config,
        inputs=[file],
        keys=RecordKeys(source="source"),
        mixture=Mixture(train_tokens=100, strategy="original"),
    )
    manifest = preprocess(changed, tmp_path / "out")
    assert set(manifest.valid) == set(labels)
    for split in manifest.valid.values():
        assert len(IndexedDatasetReader(tmp_path / "out" / split.prefix)) == split.num_documents
    assert {path.parent.name for path in (tmp_path / "out").rglob("*.bin")} == {"out", "valid"}


def test_tokenizer_without_bos(config, corpus, model_file, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model_file.read_bytes())
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": false}', encoding="utf-8")
    manifest = preprocess(dataclasses.replace(config, tokenizer=folder), tmp_path / "out")
    assert manifest.tokenizer.bos_id is None
    assert load_tokenizer(tmp_path / "out" / "tokenizer").bos_id is None
    assert (np.fromfile(tmp_path / "out" / "train.bin", np.uint16) != 1).all()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"bos_token": "<s>", "add_bos_token": False}, "does not add it; .*add_bos_token"),
        ({"bos_token": {"content": "<s>"}, "add_bos_token": False}, "the bos_token '<s>'"),
        ({"bos_token": None, "add_bos_token": False}, ""),
        ({"bos_token": "<s>"}, ""),  # this tokenizer adds it
    ],
)
def test_a_bos_token_that_is_not_added_is_told(
    settings, told, config, model_file, tmp_path, caplog
):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model_file.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    preprocess(dataclasses.replace(config, tokenizer=folder), tmp_path / "out")
    notices = [record.getMessage() for record in caplog.records]
    assert bool(notices) == bool(told)
    assert all(re.search(f"documents get no BOS.*{told}", notice) for notice in notices)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_leaves_no_dataset_behind(workers, config, tmp_path, records, write_jsonl):
    file = write_jsonl(tmp_path / "in" / "a.jsonl", [*records[:5], {"text": "x"}])
    mixture = dataclasses.replace(config.mixture, train_tokens=100)
    bad = dataclasses.replace(config, inputs=[file], workers=workers, mixture=mixture)
    with pytest.raises(DataError, match=r"a\.jsonl:6 has no source"):
        preprocess(bad, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.work"]


def test_empty_corpus(config, tmp_path, write_jsonl):
    record = {"text": "", "meta": {"redpajama_set_name": "x"}}
    file = write_jsonl(tmp_path / "a.jsonl", [record])
    mixture = dataclasses.replace(config.mixture, train_tokens=10)
    with pytest.raises(DataError, match="holds no text"):
        preprocess(dataclasses.replace(config, inputs=[file], mixture=mixture), tmp_path / "out")


def test_config_checks_itself(config):
    with pytest.raises(ConfigError, match="--workers 0"):
        dataclasses.replace(config, workers=0)
    with pytest.raises(ConfigError, match="--seed -1"):
        dataclasses.replace(config, seed=-1)


def test_stock_megatron_reads_the_dataset(dataset):
    pytest.importorskip("megatron.core")
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        eod = 2
        pad = -1
        vocab_size = 500
        unique_identifiers = {"class": "test"}  # noqa: RUF012

    ours, stock = IndexedDatasetReader(dataset / "train"), IndexedDataset(str(dataset / "train"))
    assert len(stock) == len(ours)
    np.testing.assert_array_equal(stock.sequence_lengths, ours.lengths)
    np.testing.assert_array_equal(stock.document_indices, np.arange(len(ours) + 1))
    for index in range(len(ours)):
        np.testing.assert_array_equal(stock[index], ours.read(index))
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        split="1",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=Tokenizer(),
        path_to_cache=str(dataset.parent / "cache"),
    )
    indices = np.arange(len(stock), dtype=np.int32)
    samples = GPTDataset(stock, str(dataset / "train"), indices, None, Split.train, config)
    assert len(samples) == (TRAIN_TOKENS - 1) // 64
    text = np.concatenate([ours.read(index) for index in samples.document_index])
    for sample, window in zip(samples, samples.shuffle_index, strict=True):
        np.testing.assert_array_equal(sample["tokens"], text[window * 64 : window * 64 + 64])


def test_manifest_is_plain_json(dataset):
    content = json.loads((dataset / "manifest.json").read_text("utf-8"))
    assert content["format_version"] == 1
    assert content["train"]["num_tokens"] == TRAIN_TOKENS
    assert content["tokenizer"]["eod_id"] == 2
    assert str(dataset.parent) not in json.dumps(content)


def test_a_download_that_begins_meanwhile_does_not_matter(config, tmp_path, records, write_jsonl):
    write_jsonl(tmp_path / "in" / "a.jsonl", records)
    ours = dataclasses.replace(config, inputs=[tmp_path / "in"])

    def download(progress):
        (tmp_path / "in" / "b.jsonl.part").touch()

    manifest = preprocess(ours, tmp_path / "out", download)
    assert [item.name for item in manifest.inputs] == ["a.jsonl"]
