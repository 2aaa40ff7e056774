"""Bytes come back as they were given, whatever their place and size; errors of threads are not lost."""

import errno
import os
import threading
from pathlib import Path

import pytest
import torch

from megatron_long.checkpoint import direct_io, stored
from megatron_long.checkpoint.direct_io import FileWriter, read_bytes
from megatron_long.checkpoint.stored import StoredTensor, read_ahead
from megatron_long.hashing import hash_file

CONTENT = os.urandom(50_000)


@pytest.fixture(params=["direct", "cached", "refused"])
def access(request, monkeypatch) -> None:
    """File systems that know direct access, that do not, and that say so only when bytes move."""
    if request.param == "cached":
        monkeypatch.setattr(direct_io, "_DIRECT", 0)
    if request.param == "refused":
        for name in ("preadv", "pwrite"):
            monkeypatch.setattr(os, name, refuse_once(getattr(os, name)))


def refuse_once(call):
    seen = set()

    def refuse(file, *args):
        if file not in seen:
            seen.add(file)
            raise OSError(errno.EINVAL, "no direct access")
        return call(file, *args)

    return refuse


@pytest.mark.parametrize("piece", [1, 4096, 16_384, 20_001, 50_000])
def test_what_is_written_lies_there_and_its_hash_is_known(tmp_path, monkeypatch, access, piece):
    monkeypatch.setattr(direct_io, "BLOCK_BYTES", 8192)
    with FileWriter(tmp_path / "file") as file:
        for start in range(0, len(CONTENT), piece):
            data = bytearray(CONTENT[start : start + piece])
            assert file.write(data) == len(data)
            data[:] = bytes(len(data))  # the caller may use its memory again
        assert file.tell() == len(CONTENT)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert file.info == hash_file(tmp_path / "file")


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 50_000), (1, 2), (4096, 4096), (4095, 8194), (49_999, 1), (7, 0)]
)
def test_any_part_is_read(tmp_path, monkeypatch, access, offset, size):
    monkeypatch.setattr(direct_io, "BLOCK_BYTES", 8192)
    (tmp_path / "file").write_bytes(CONTENT)
    found = read_bytes(tmp_path / "file", offset, size)
    assert found.numpy().tobytes() == CONTENT[offset : offset + size]
    assert found.untyped_storage().nbytes() == size
    with pytest.raises(OSError, match="is 1 bytes too short"):
        read_bytes(tmp_path / "file", offset, len(CONTENT) - offset + 1)


def test_values_at_odd_places(tmp_path):
    """Old safetensors have headers of any length."""
    values = torch.arange(100, dtype=torch.float32)
    (tmp_path / "file").write_bytes(b"xyz" + values.numpy().tobytes())
    place = StoredTensor(
        path=tmp_path / "file", offset=3, shape=(100,), stored_dtype="F32", size_bytes=400
    )
    assert place.tensor().equal(values)
    assert place.tensor().data_ptr() % 4 == 0


def test_a_disk_that_refuses_is_heard_of(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    monkeypatch.setattr(direct_io, "BLOCK_BYTES", 8192)
    with pytest.raises(OSError, match="No space left"), FileWriter(tmp_path / "one") as file:
        file.write(b"short")
    with pytest.raises(OSError, match="No space left"):
        write_on(tmp_path / "two")


def write_on(path: Path) -> None:
    with FileWriter(path) as file:
        for _ in range(100):
            file.write(CONTENT)
            file.raise_error()
        pytest.fail("nothing was heard before the end")


def test_reading_ahead_keeps_order_and_bounds(monkeypatch):
    monkeypatch.setattr(stored, "LOOKAHEAD_BYTES", 30)
    begun: list[int] = []

    def read(number: int) -> int:
        begun.append(number)
        if number == 6:
            raise ValueError("six")
        return number * number

    before = threading.active_count()
    found = read_ahead(range(9), read, lambda number: 10)
    assert next(found) == (0, 0)
    assert max(begun) <= 3
    assert [next(found) for _ in range(5)] == [(n, n * n) for n in range(1, 6)]
    with pytest.raises(ValueError, match="six"):
        next(found)
    assert threading.active_count() == before


def test_what_is_larger_than_the_bound_is_read_alone(monkeypatch):
    monkeypatch.setattr(stored, "LOOKAHEAD_BYTES", 1)
    assert list(read_ahead("abc", str.upper, lambda _: 10)) == [("a", "A"), ("b", "B"), ("c", "C")]
