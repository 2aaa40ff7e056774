"""Our shards are torch's, byte for byte; what the writer records is what lies on the disk."""

import errno
import io
import multiprocessing
import os
import queue
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import (
    SerializationFormat,
    _StorageWriterTransforms,
    _write_item,
)
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from megatron_long.checkpoint import shard_writer
from megatron_long.checkpoint.choosing import remove_leftovers
from megatron_long.checkpoint.hashes import (
    hash_files,
    leave_shard_hashes,
    remove_unfinished,
    take_shard_hashes,
)
from megatron_long.checkpoint.shard_writer import (
    Bucket,
    HostMemory,
    copy_in_blocks,
    leave,
    stage,
    write_shards,
)


def tensor_item(name: str) -> WriteItem:
    return WriteItem(MetadataIndex(name), WriteItemType.TENSOR)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An unfinished checkpoint."""
    path = tmp_path / ".iter_0000004.partial"
    path.mkdir()
    return path


def make_buckets(folder: Path) -> list[Bucket]:
    """Two files: of objects and tensors, one of them empty, one without axes."""
    values = {
        "a": torch.arange(5000, dtype=torch.bfloat16).view(50, 100),
        "b": torch.tensor(3.0),
        "c": torch.empty(0, 4),
        "d": torch.randn(7, 3, generator=torch.Generator().manual_seed(0)),
    }
    items = [(tensor_item(name), value) for name, value in values.items()]
    objects = [(WriteItem(MetadataIndex("o"), WriteItemType.BYTE_IO), io.BytesIO(b"object"))]
    names = ("__3_0.distcp", "__3_1.distcp")
    return [
        (str(folder / names[0]), names[0], (objects, items[:3])),
        (str(folder / names[1]), names[1], ([], items[3:])),
    ]


def write_with_torch(bucket: Bucket) -> tuple[bytes, list]:
    stream = io.BytesIO()
    _, name, (objects, tensors) = bucket
    transforms, form = _StorageWriterTransforms(), SerializationFormat.TORCH_SAVE
    results = [
        _write_item(transforms, stream, data, item, name, form)
        for item, data in (*objects, *tensors)
    ]
    return stream.getvalue(), results


@pytest.mark.parametrize("prepare", [stage, leave])
def test_files_and_results_are_those_of_torch(prepare, folder):
    buckets, results = make_buckets(folder), queue.Queue()
    assert write_shards(None, 3, prepare(buckets), results) is None
    written = results.get_nowait()
    for number, bucket in enumerate(make_buckets(folder)):
        content, expected = write_with_torch(bucket)
        assert Path(bucket[0]).read_bytes() == content
        assert written[number] == expected
    recorded = take_shard_hashes(folder, 3)
    assert recorded == hash_files(folder, [bucket[1] for bucket in buckets])
    assert take_shard_hashes(folder, 3) is None
    assert len(list(folder.iterdir())) == 2
    assert len(list(folder.parent.iterdir())) == 1


def test_ranks_take_their_own_records(folder):
    infos = hash_files(folder, [])
    leave_shard_hashes(folder, 1, infos)
    assert take_shard_hashes(folder, 11) is None
    assert take_shard_hashes(folder, 1) == {}


def test_any_error_is_the_result(folder):
    """An exception would end the process that writes in the background, and training would wait for it."""
    buckets, results = make_buckets(folder), queue.Queue()
    buckets[0][2][1][0] = (tensor_item("a"), torch.empty(3, device="meta"))  # which cannot be saved
    error = write_shards(None, 3, buckets, results)
    assert not isinstance(error, OSError | None)
    assert results.get_nowait() is error
    assert results.empty()


@pytest.mark.parametrize("content", ["", "[]", '{"x": {}}', '{"x": 1}'])
def test_a_damaged_record_is_none(content, folder):
    """The shards are then read again for their hashes."""
    leave_shard_hashes(folder, 2, {})
    (record,) = folder.parent.glob("*.2.partial")
    record.write_text(content)
    assert take_shard_hashes(folder, 2) is None
    assert not record.exists()


def test_leftovers_of_any_kind_are_removed(folder):
    (folder.parent / ".iter_0000004.7.partial").mkdir()
    remove_unfinished(folder)
    assert not list(folder.parent.iterdir())
    (folder.parent / ".iter_0000008.partial").symlink_to("/nonexistent")
    remove_leftovers(folder.parent)
    assert not list(folder.parent.iterdir())


def test_records_go_with_their_checkpoint(folder):
    other = folder.with_name(".iter_0000008.partial")
    other.mkdir()
    for path, rank in ((folder, 0), (folder, 11), (other, 0)):
        leave_shard_hashes(path, rank, {})
    remove_unfinished(folder)
    assert sorted(path.name for path in other.parent.iterdir()) == [
        ".iter_0000008.0.partial",
        ".iter_0000008.partial",
    ]


def test_a_full_disk_is_the_result(monkeypatch, folder):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    results: queue.Queue = queue.Queue()
    error = write_shards(None, 3, make_buckets(folder), results)
    assert error is not None
    assert error.errno == errno.ENOSPC
    assert results.get_nowait() is error
    assert results.empty()
    assert take_shard_hashes(folder, 3) is None


def test_another_process_stages_and_writes(folder):
    """As Megatron's persistent writer does, which is started with "spawn" and gets a pickled request."""
    context = multiprocessing.get_context("spawn")
    results, buckets = context.Queue(), make_buckets(folder)
    for action in (partial(stage, buckets), partial(write_shards, None, 3, buckets, results)):
        process = context.Process(target=action)
        process.start()
        process.join()
        assert process.exitcode == 0
    assert sorted(results.get()) == [0, 1]
    assert take_shard_hashes(folder, 3) == hash_files(folder, [name for _, name, _ in buckets])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 100])
def test_blocks_of_any_size_copy_everything(dtype, count):
    source = torch.randn(count, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    target = torch.empty_like(source)
    copy_in_blocks(source, target, torch.empty(16, dtype=torch.uint8))
    assert target.view(torch.uint8).equal(source.view(torch.uint8))


def test_memory_for_one_tensor_after_another():
    """Each has a storage of its own size, because torch saves whole storages."""
    memory = HostMemory()
    for shape, dtype in (((3, 5), torch.float32), ((10_000,), torch.bfloat16), ((2,), torch.int64)):
        source = torch.ones(shape, dtype=dtype)
        held = memory.like(source)
        held.copy_(source)
        assert held.equal(source)
        assert held.untyped_storage().nbytes() == source.nbytes


def test_what_is_on_the_host_is_not_copied():
    tensor = torch.ones(3)
    assert shard_writer.to_host(tensor) is tensor
