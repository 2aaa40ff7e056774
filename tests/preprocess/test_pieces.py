"""Large files are read in pieces, and nothing of the dataset shows it."""

import dataclasses

import numpy as np
import pytest

from megatron_long.corpus import inputs
from megatron_long.corpus.documents import BadDocuments, FileState, RecordKeys, read_documents
from megatron_long.corpus.inputs import hash_input
from megatron_long.corpus.listing import find_inputs
from megatron_long.dataset.inspection import DatasetBrowser
from megatron_long.dataset.manifest import read_manifest
from megatron_long.errors import DataError
from megatron_long.mixture.mixture import Mixture
from megatron_long.preprocess import file_pieces as pieces_module
from megatron_long.preprocess.executors import ExecutorOptions
from megatron_long.preprocess.file_pieces import find_pieces, split_inputs
from megatron_long.preprocess.preprocess import preprocess
from megatron_long.preprocess.preprocess_config import PreprocessConfig
from megatron_long.preprocess.workdir import _known_hashes, open_work
from tests.corpus_fixtures import files_of


def read_all(items, skip=False):
    found = []
    for item in items:
        for batch in read_documents(item, RecordKeys(), BadDocuments(skip), FileState()):
            found += batch
    return found


@pytest.fixture
def parquet(tmp_path, records):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"text": r["text"], "source": r["meta"]["redpajama_set_name"]} for r in records]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=70)
    return tmp_path / "c.parquet"


@pytest.mark.parametrize("piece_bytes", [1, 100, 5000, 20_000, 10**9])
def test_pieces_are_the_file(piece_bytes, tmp_path, write_jsonl, records):
    whole = find_inputs([write_jsonl(tmp_path / "a.jsonl", records)])[0]
    pieces, digest = find_pieces(whole, piece_bytes)
    assert digest == hash_input(whole)
    ends = np.cumsum([piece.piece_bytes for piece in pieces]).tolist()
    assert [piece.start_bytes for piece in pieces] == [0, *ends[:-1]]
    assert ends[-1] == whole.size_bytes
    assert len(pieces) == 1 if piece_bytes == 10**9 else len(pieces) > 5
    items = [dataclasses.replace(whole, **dataclasses.asdict(piece)) for piece in pieces]
    assert read_all(items) == read_all([whole])


def test_pieces_of_a_parquet_file_are_row_groups(parquet):
    whole = find_inputs([parquet])[0]
    pieces, digest = find_pieces(whole, 5000)
    assert digest == hash_input(whole)
    assert len(pieces) > 3
    assert pieces[0].groups[0] == 0
    assert pieces[-1].groups[1] == 9
    assert sum(piece.piece_bytes for piece in pieces) == whole.size_bytes
    items = [dataclasses.replace(whole, **dataclasses.asdict(piece)) for piece in pieces]
    assert read_all(items) == read_all([whole])


def test_blank_lines_and_a_last_line_without_an_end(tmp_path):
    line = b'{"text": "a b", "source": "x"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n\n" + b"\n".join([line] * 20))
    whole = find_inputs([tmp_path / "a.jsonl"])[0]
    pieces, _ = find_pieces(whole, 40)
    items = [dataclasses.replace(whole, **dataclasses.asdict(piece)) for piece in pieces]
    assert [document.line for document in read_all(items)] == list(range(3, 23))


def test_a_file_that_grows_meanwhile(tmp_path, write_jsonl, records):
    item = find_inputs([write_jsonl(tmp_path / "a.jsonl", records)])[0]
    write_jsonl(tmp_path / "a.jsonl", [*records, *records])
    with pytest.raises(DataError, match="changed while it was read"):
        find_pieces(item, 1000)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_shares_are_the_file(count, suffix, tmp_path, write_jsonl, records, monkeypatch):
    monkeypatch.setattr(inputs, "SHARE_BYTES", 3000)
    whole = find_inputs([write_jsonl(tmp_path / f"a.jsonl{suffix}", [*records, {}, *records])])[0]
    shares = [dataclasses.replace(whole, share=(number, count)) for number in range(count)]
    assert sum(share.read_bytes for share in shares) == whole.size_bytes
    bad, states, found = BadDocuments(skip=True), [], []
    for share in shares:
        states.append(FileState())
        found.append(
            [d for part in read_documents(share, RecordKeys(), bad, states[-1]) for d in part]
        )
    assert min(map(len, found)) > 600 // count
    assert sorted((d for part in found for d in part), key=lambda d: d.line) == read_all(
        [whole], True
    )
    assert bad.count == 1
    assert {state.xxh3_128 for state in states} == {hash_input(whole)}
    assert [state.position_bytes for state in states] == [share.read_bytes for share in shares]


def read_skipping(items):
    bad = BadDocuments(skip=True)
    for item in items:
        list(read_documents(item, RecordKeys(), bad, FileState()))
    return bad.listed


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damage_is_told_by_one_share(suffix, tmp_path, write_jsonl, records, monkeypatch):
    monkeypatch.setattr(inputs, "SHARE_BYTES", 3000)
    path = write_jsonl(tmp_path / f"a.jsonl{suffix}", records)
    path.write_bytes(path.read_bytes()[:-5000])
    whole = find_inputs([path])[0]
    shares = [dataclasses.replace(whole, share=(number, 4)) for number in range(4)]
    assert read_skipping(shares) == read_skipping([whole])
    with pytest.raises(DataError, match="cut off or damaged"):
        read_all(shares)


def test_shares_are_as_many_as_workers_need(tmp_path, write_jsonl, records, monkeypatch):
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 4000)
    for name in ("a.jsonl.zst", "b.jsonl.gz", "c.jsonl.zst"):
        write_jsonl(tmp_path / "in" / name, records)
    alone, together = find_inputs([tmp_path / "in/a.jsonl.zst"]), find_inputs([tmp_path / "in"])

    def shares(files, name, workers):
        items = split_inputs(files, tmp_path / name, ExecutorOptions(workers=workers))
        return [item.share for item in items]

    assert shares(alone, "one", 1) == [(0, 1)]
    assert shares(alone, "four", 4) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert shares(alone, "four", 2) == [(0, 4), (1, 4), (2, 4), (3, 4)]  # resumed with fewer
    assert shares(together, "three", 3) == [(0, 1)] * 3
    assert len(shares(together, "many", 12)) in (12, 13, 14)


@pytest.fixture
def config(tmp_path, write_jsonl, records, parquet, model_file):
    write_jsonl(tmp_path / "in" / "a.jsonl", records[:400])
    write_jsonl(tmp_path / "in" / "b.jsonl.zst", records[400:])
    parquet.rename(tmp_path / "in" / "c.parquet")
    mixture = Mixture(
        train_tokens=9000,
        long_threshold_tokens=300,
        short_keep_ratio=0.3,
        valid_tokens_per_source=2000,
    )
    return PreprocessConfig(
        inputs=[tmp_path / "in"], tokenizer=model_file, mixture=mixture, engine="reference"
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dataset_does_not_show_the_pieces(workers, config, tmp_path, monkeypatch):
    preprocess(config, tmp_path / "whole")
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 4000)
    config = dataclasses.replace(config, workers=workers, keep_work=True)
    preprocess(config, tmp_path / "out")
    assert len(list((tmp_path / "out.work" / "tokens.0").iterdir())) > 20
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    inputs = {item.name: item.xxh3_128 for item in read_manifest(tmp_path / "out").inputs}
    assert inputs == {item.name: hash_input(item) for item in find_inputs([tmp_path / "in"])}
    assert _known_hashes(tmp_path / "out.work") == inputs


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_dataset_does_not_show_the_shares(
    suffix, config, tmp_path, write_jsonl, records, monkeypatch
):
    many = [*records[:300], *[{}] * 50, *records[300:]]
    path = write_jsonl(tmp_path / "one" / f"a.jsonl{suffix}", many)
    path.write_bytes(path.read_bytes()[:-3000])
    config = dataclasses.replace(config, inputs=[path], on_bad_document="skip")
    preprocess(config, tmp_path / "whole")
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 4000)
    monkeypatch.setattr(inputs, "SHARE_BYTES", 3000)
    # As if a run with five workers was killed, and resumed with one.
    work, files = tmp_path / "out.work", find_inputs([path])
    open_work(work, config.command(), files, force=False)
    split_inputs(files, work, ExecutorOptions(workers=5))
    preprocess(dataclasses.replace(config, keep_work=True), tmp_path / "out")
    assert len(list((tmp_path / "out.work" / "tokens.0").iterdir())) == 5
    assert read_manifest(tmp_path / "out").documents_bad == 51
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_held_out_document_knows_its_line(config, tmp_path, monkeypatch, records):
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 4000)
    preprocess(config, tmp_path / "out")
    browser = DatasetBrowser(tmp_path / "out", "Book")
    for document in range(len(browser.reader)):
        name, _, line = browser.place(document).rpartition(":")
        number = int(line) - 1 + (400 if name == "b.jsonl.zst" else 0)
        text = browser.decode(browser.reader.read(document))
        assert text == records[number]["text"]


def test_more_workers_than_pieces_are_told_of(config, tmp_path, caplog):
    files = find_inputs(config.inputs)
    assert split_inputs(files, tmp_path / "work", ExecutorOptions(workers=3)) == files
    assert not caplog.records
    split_inputs(files, tmp_path / "work", ExecutorOptions(workers=4))
    assert "--workers 4: the corpus has 3 files or pieces" in caplog.text
