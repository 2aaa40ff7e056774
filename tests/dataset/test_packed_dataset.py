import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from megatron_long.dataset.indexed import IndexedDatasetWriter  # noqa: E402
from megatron_long.dataset.packed_dataset import PackedDataset  # noqa: E402
from megatron_long.errors import ConfigError  # noqa: E402

EOD = 2


@pytest.fixture
def prefix(tmp_path):
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(tmp_path / "train", "<u2") as writer:
        for length in generator.integers(1, 150, 40):
            writer.add_document(np.append(generator.integers(3, 60_000, length), EOD))
        writer.finalize()
    return tmp_path / "train"


def all_tokens(prefix):
    return np.fromfile(prefix.with_name("train.bin"), np.uint16).astype(np.int64)


@pytest.mark.parametrize("seq_length", [64, 128, 7])
def test_windows_are_the_file_in_order(prefix, seq_length):
    tokens, dataset = all_tokens(prefix), PackedDataset(prefix, seq_length)
    assert len(dataset) == (len(tokens) - 1) // seq_length
    for index in range(len(dataset)):
        sample, start = dataset[index], index * seq_length
        np.testing.assert_array_equal(sample["tokens"], tokens[start : start + seq_length])
        np.testing.assert_array_equal(sample["labels"], tokens[start + 1 : start + seq_length + 1])
        np.testing.assert_array_equal(sample["position_ids"], np.arange(seq_length))
        assert sample["tokens"].dtype == sample["labels"].dtype == torch.int64
        assert sample["position_ids"].dtype == torch.int64
        assert sample["loss_mask"].dtype == torch.float32
        assert sample["loss_mask"].sum() == seq_length


def test_two_short_windows_are_one_long_window(prefix):
    short, long = PackedDataset(prefix, 64), PackedDataset(prefix, 128)
    for index in range(len(long)):
        for name in ("tokens", "labels"):
            halves = [short[2 * index][name], short[2 * index + 1][name]]
            assert torch.equal(torch.cat(halves), long[index][name])


def test_loss_skips_the_token_after_a_document(prefix):
    dataset = PackedDataset(prefix, 64, eod_id=EOD)
    masks = torch.stack([dataset[index]["loss_mask"] for index in range(len(dataset))])
    tokens = torch.stack([dataset[index]["tokens"] for index in range(len(dataset))])
    assert torch.equal(masks == 0, tokens == EOD)
    assert (masks == 0).any()


@pytest.mark.parametrize("seq_length", [64, 128])
def test_document_starts_follow_each_eod(prefix, seq_length):
    dataset = PackedDataset(prefix, seq_length)
    for index in range(len(dataset)):
        tokens = dataset[index]["tokens"].numpy()
        after_eod = np.flatnonzero(tokens[:-1] == EOD) + 1
        assert dataset.document_starts(index).tolist() == [0, *after_eod.tolist()]


def test_more_samples_than_one_pass(prefix):
    one_pass = len(PackedDataset(prefix, 64))
    with pytest.raises(ConfigError, match=rf"asks for {one_pass + 1} .* holds {one_pass}"):
        PackedDataset(prefix, 64, num_samples=one_pass + 1)
    dataset = PackedDataset(prefix, 64, num_samples=2 * one_pass, allow_repeat=True)
    assert len(dataset) == 2 * one_pass
    assert torch.equal(dataset[one_pass + 3]["tokens"], dataset[3]["tokens"])
    assert dataset.document_starts(one_pass + 3).tolist() == dataset.document_starts(3).tolist()
    with pytest.raises(IndexError):
        dataset[2 * one_pass]


def test_fewer_samples_than_one_pass(prefix):
    dataset = PackedDataset(prefix, 64, num_samples=3)
    assert len(dataset) == 3
    assert len(list(torch.utils.data.DataLoader(dataset, batch_size=1))) == 3


def test_too_few_tokens_for_one_sample(prefix):
    with pytest.raises(ConfigError, match="too few for one sample of --seq-length 100000"):
        PackedDataset(prefix, 100_000)


def test_pickles_without_its_data(prefix):
    dataset = PackedDataset(prefix, 64)
    content = pickle.dumps(dataset)
    assert len(content) < 1000
    assert torch.equal(pickle.loads(content)[5]["tokens"], dataset[5]["tokens"])
