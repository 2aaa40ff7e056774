import pickle

import numpy as np
import pytest

from megatron_long.dataset.indexed import (
    IndexedDatasetReader,
    IndexedDatasetWriter,
    bin_path,
    idx_path,
    token_dtype,
)
from megatron_long.errors import DataError

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12], [1, 2]]
ALL_TOKENS = [token for document in DOCUMENTS for token in document]


def write(prefix, documents=DOCUMENTS, dtype="<u2"):
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document))
        writer.finalize()
    return prefix


@pytest.mark.parametrize("vocab_size", [65499, 65500])
def test_round_trip(tmp_path, vocab_size):
    dtype = token_dtype(vocab_size)
    highest = [[vocab_size - 1, 0]]
    reader = IndexedDatasetReader(write(tmp_path / "a.b", DOCUMENTS + highest, dtype))
    assert reader.dtype == dtype
    assert [reader.read(i).tolist() for i in range(len(reader))] == DOCUMENTS + highest
    assert reader.lengths.tolist() == [3, 1, 4, 2, 2]
    assert reader.num_tokens == 12
    assert reader.read_span(2, 5).tolist() == ALL_TOKENS[2:7]


def test_files_are_bytes_of_megatrons_own_builder(tmp_path):
    torch = pytest.importorskip("torch")
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "stock.bin"), dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "stock.idx"))
    write(tmp_path / "ours")
    for suffix in ("bin", "idx"):
        stock, ours = tmp_path / f"stock.{suffix}", tmp_path / f"ours.{suffix}"
        assert ours.read_bytes() == stock.read_bytes()


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_document_starts_agree_with_a_scan(tmp_path, count):
    reader = IndexedDatasetReader(write(tmp_path / "a"))
    starts = np.cumsum([0, *map(len, DOCUMENTS)])[:-1]
    for first in range(len(ALL_TOKENS) - count + 1):
        inside = [s - first for s in starts.tolist() if first < s < first + count]
        assert reader.document_starts(first, count).tolist() == [0, *inside]


def test_pickle_reopens_the_files(tmp_path):
    reader = IndexedDatasetReader(write(tmp_path / "a", [list(range(1000))] * 20))
    content = pickle.dumps(reader)
    assert len(content) < 500
    assert pickle.loads(content).read(3).tolist() == list(range(1000))


def test_nothing_appears_before_finalize_or_after_an_error(tmp_path):
    def fail():
        with IndexedDatasetWriter(tmp_path / "a", "<u2") as writer:
            writer.add_document(np.array([1, 2]))
            assert not bin_path(tmp_path / "a").exists()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_empty_dataset(tmp_path):
    reader = IndexedDatasetReader(write(tmp_path / "a", []))
    assert (len(reader), reader.num_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (idx_path, lambda content: b"XX" + content[2:], "is not a Megatron dataset index"),
        (idx_path, lambda content: b"", "is not a Megatron dataset index"),
        (idx_path, lambda content: content[:9] + b"\2" + content[10:], "has version 2"),
        (idx_path, lambda content: content[:17] + b"\6" + content[18:], "token type 6"),
        (idx_path, lambda content: content[:-1], "is cut off"),
        (bin_path, lambda content: content[:-2], "18 bytes, but .* describes 20"),
        (bin_path, lambda content: None, "does not exist"),
    ],
)
def test_damaged_files(tmp_path, file, change, message):
    path = file(write(tmp_path / "a"))
    content = change(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        IndexedDatasetReader(tmp_path / "a")
