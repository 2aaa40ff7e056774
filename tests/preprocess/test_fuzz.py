"""Readers fed with what no writer made: an answer or one clear error, soon, in little memory."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_long.corpus.documents import BadDocuments, FileState, RecordKeys, read_documents
from megatron_long.corpus.inputs import InputFile
from megatron_long.dataset.indexed import DTYPE_CODES, HEADER, MAGIC, IndexedDatasetReader
from megatron_long.dataset.manifest import read_manifest
from megatron_long.errors import UserError
from megatron_long.mixture.shares import read_shares

FUZZ = settings(
    max_examples=60,
    deadline=None,  # memory is what is bounded; a busy machine may take its time
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MEMORY_BYTES = 64 << 20

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@contextmanager
def little_memory():
    """Refuse a peak of more than `MEMORY_BYTES`."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES
    finally:
        tracemalloc.stop()


def refusal(action: Callable[[], object]) -> str | None:
    """The message of a clear error, or None; any other exception comes through."""
    try:
        action()
    except UserError as error:
        return str(error)
    return None


def read_all(path: Path) -> tuple[int, int]:
    """Documents and bad ones of a file, read as `--on-bad-document skip` does."""
    item = InputFile(path.name, str(path), path.stat().st_size, "")
    bad = BadDocuments(skip=True)
    batches = read_documents(item, RecordKeys(), bad, FileState())
    return sum(len(batch) for batch in batches), bad.count


def check_stop(path: Path) -> None:
    """The same without skipping: an error names the file, or there is none."""
    item = InputFile(path.name, str(path), path.stat().st_size, "")
    message = refusal(lambda: list(read_documents(item, RecordKeys(), BadDocuments(), FileState())))
    assert message is None or path.name in message


@FUZZ
@given(lines=st.lists(st.binary(max_size=80) | json_values.map(lambda v: json.dumps(v).encode())))
@example(lines=[b'{"text": ' * 5000])
@example(lines=[b'{"text": "a", "source": "s"}', b"\xff\xfe", b"[" * 100_000, b"0" * 100_000])
@example(lines=[b'{"text": "\\ud800", "source": "s"}'])
def test_jsonl(lines, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with little_memory():
        documents, bad = read_all(path)
    assert documents + bad <= sum(line.count(b"\n") + 1 for line in lines) + 1
    check_stop(path)


@FUZZ
@given(content=st.binary(max_size=400))
@example(content=b"\x28\xb5\x2f\xfd")
def test_zst_of_any_bytes(content, tmp_path):
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(content)
    with little_memory():
        read_all(path)
    check_stop(path)


@FUZZ
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255), cut=st.floats(0, 1))
def test_zst_with_a_wrong_byte_or_a_wrong_end(place, value, cut, tmp_path):
    lines = b"".join(b'{"text": "document %d", "source": "s"}\n' % n for n in range(300))
    packed = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(lines))
    packed[int(place * len(packed))] ^= value
    path = tmp_path / "x.jsonl.zst"
    for content in (packed, packed[: int(cut * len(packed))]):
        path.write_bytes(content)
        with little_memory():
            documents, _ = read_all(path)
        assert documents <= 300
        check_stop(path)


def test_zst_that_unpacks_to_much_is_read_in_pieces(tmp_path):
    """300 MB of text in some 50 KB of file: lines are read as they come, and not all at once."""
    compressor = zstandard.ZstdCompressor().compressobj()
    line = b'{"text": "%s", "source": "s"}\n' % (b"a" * 10_000)
    packed = b"".join(compressor.compress(line * 1000) for _ in range(30)) + compressor.flush()
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(packed)
    tracemalloc.start()
    try:
        assert read_all(path)[0] == 30_000
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES
    finally:
        tracemalloc.stop()


def open_index(folder: Path) -> None:
    def read() -> None:
        reader = IndexedDatasetReader(folder / "train")
        for index in (0, len(reader) // 2, len(reader) - 1):
            if len(reader):
                reader.read(index)
        reader.document_starts(0, 100)
        reader.documents_between(0, 100)

    message = refusal(read)
    assert message is None or "train." in message


@FUZZ
@given(
    code=st.sampled_from([*DTYPE_CODES.values(), 1, 255]),
    count=st.integers(0, 4) | st.integers(0, 2**64 - 1),
    indices=st.integers(0, 5) | st.integers(0, 2**64 - 1),
    body=st.binary(max_size=120),
    tokens=st.binary(max_size=60),
)
@example(code=8, count=2**61, indices=2**61, body=b"", tokens=b"")
def test_index_of_any_header(code, count, indices, body, tokens, tmp_path):
    header = HEADER.pack(MAGIC, 1, code, count, indices)
    (tmp_path / "train.idx").write_bytes(header + body)
    (tmp_path / "train.bin").write_bytes(tokens)
    with little_memory():
        open_index(tmp_path)


@FUZZ
@given(data=st.data())
def test_index_with_a_wrong_byte(data, tmp_path):
    lengths, size = [3, 4, 5], 2
    starts = [0, 6, 14]
    content = bytearray(HEADER.pack(MAGIC, 1, 8, 3, 4))
    content += struct.pack("<3i3q4q", *lengths, *starts, 0, 1, 2, 3)
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    (tmp_path / "train.idx").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    (tmp_path / "train.bin").write_bytes(bytes(sum(lengths) * size))
    with little_memory():
        open_index(tmp_path)


def open_manifest(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    message = refusal(lambda: read_manifest(folder))
    assert message is None or str(folder) in message


@FUZZ
@given(content=st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
@example(content=b"[" * 100_000)
@example(content=b'{"format_version": 1, "fingerprint": "x", "tokenizer": 1}')
def test_manifest_of_any_bytes(content, tmp_path):
    with little_memory():
        open_manifest(tmp_path, content)


@FUZZ
@given(data=st.data())
def test_manifest_with_another_value(data, tmp_path, tiny_dataset):
    content = json.loads((tiny_dataset / "manifest.json").read_text())
    place = content
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(json_values)
    with little_memory():
        open_manifest(tmp_path, json.dumps(content).encode())


@FUZZ
@given(content=st.binary(max_size=120) | st.text(max_size=120).map(str.encode))
@example(content=b"shares: &a [*a]")
@example(content=b"shares: {Book: .nan}")
@example(content=b"[" * 20_000)
@example(content=b"shares: {? [a] : 1}")
@example(content=b"2024-99-99: 1")
def test_shares_of_any_bytes(content, tmp_path):
    path = tmp_path / "shares.yaml"
    path.write_bytes(content)
    with little_memory():
        message = refusal(lambda: read_shares(path))
    assert message is None or "shares.yaml" in message


@FUZZ
@given(
    size=st.integers(0, 200) | st.integers(0, 2**64 - 1),
    header=st.binary(max_size=120) | json_values.map(lambda value: json.dumps(value).encode()),
    body=st.binary(max_size=40),
)
@example(size=2**63, header=b"{}", body=b"")
@example(size=2, header=b"{}", body=b"")
def test_safetensors_header(size, header, body, tmp_path):
    from megatron_long.conversion.formats.hf_folder import HfWeights

    def read() -> None:
        with HfWeights(tmp_path) as weights:
            for name in weights.names:
                weights.stored_dtype(name)
                weights.shape(name)

    for length in (size, len(header)):
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + header + body)
        with little_memory():
            message = refusal(read)
        assert message is None or str(tmp_path) in message


@FUZZ
@given(content=st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
@example(content=b"[" * 100_000)
@example(content=b'{"files": {"a": {"size_bytes": 1}}, "xxh3_128_of_this_file": "x"}')
def test_checkpoint_hashes_of_any_bytes(content, tmp_path):
    from megatron_long.checkpoint.hashes import find_damage

    (tmp_path / "hashes.json").write_bytes(content)
    with little_memory():
        (damage,) = find_damage(tmp_path)
    assert str(tmp_path / "hashes.json") in damage
