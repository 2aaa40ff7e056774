"""Arrow files in both formats: what pyarrow wrote is read back, damage is found."""

import random
import struct

import pytest

from megatron_long.corpus.documents import BadDocuments, FileState, RecordKeys, read_documents
from megatron_long.corpus.inputs import hash_input
from megatron_long.corpus.listing import find_inputs
from megatron_long.errors import DataError

arrow = pytest.importorskip("pyarrow")
ipc = pytest.importorskip("pyarrow.ipc")

WRITERS = {"stream": ipc.new_stream, "file": ipc.new_file}


def write(path, tables, form="stream", **options):
    with WRITERS[form](path, tables[0].schema, options=ipc.IpcWriteOptions(**options)) as writer:
        for table in tables:
            writer.write_table(table)
    return path


def read(path, keys=None, *, skip=False, batch_bytes=1 << 20):
    bad, state = BadDocuments(skip), FileState(batch_bytes=batch_bytes)
    (item,) = find_inputs([path])
    batches, positions = [], []
    for batch in read_documents(item, keys or RecordKeys(), bad, state):
        batches.append(batch)
        positions.append(state.position_bytes)
    assert positions == sorted(positions)
    return [document for batch in batches for document in batch], bad, len(batches)


@pytest.fixture
def tables(records):
    rows = [record | {"id": number} for number, record in enumerate(records)]
    return [arrow.Table.from_pylist(rows[:250]), arrow.Table.from_pylist(rows[250:])]


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"use_legacy_format": True}])
@pytest.mark.parametrize("where", ["", "file://"])
def test_rows_are_read_as_lines_are(form, options, where, tables, records, tmp_path):
    write(tmp_path / "a.arrow", tables, form, **options)
    found, _, _ = read(f"{where}{tmp_path}/a.arrow")
    assert [document.text for document in found] == [record["text"] for record in records]
    assert [document.line for document in found] == list(range(1, 601))
    assert {document.source for document in found} == {"Book", "C4", "GitHub"}


def test_a_large_batch_is_read_in_steps(tables, tmp_path):
    path = write(tmp_path / "a.arrow", [arrow.concat_tables(tables).combine_chunks()])
    whole, _, count = read(path)
    steps, _, more = read(path, batch_bytes=4000)
    assert steps == whole
    assert count == 1
    assert more > 20


@pytest.mark.parametrize("kind", ["large_string", "string_view"])
def test_kinds_of_strings_and_dictionaries(kind, tmp_path):
    schema = arrow.schema(
        [
            ("text", getattr(arrow, kind)()),
            ("source", arrow.dictionary(arrow.int8(), arrow.string())),
        ]
    )
    rows = [{"text": "one", "source": "x"}, {"text": "two", "source": "y"}]
    path = write(tmp_path / "a.arrow", [arrow.Table.from_pylist(rows, schema)] * 2)
    assert [(one.text, one.source) for one in read(path)[0]] == [("one", "x"), ("two", "y")] * 2


@pytest.mark.parametrize("form", WRITERS)
def test_rows_without_text_or_source_are_named(form, tmp_path):
    write(tmp_path / "a.arrow", [arrow.table({"body": ["x"], "other": ["y"]})], form)
    with pytest.raises(DataError, match=r"a\.arrow:1 has no text string at 'text'"):
        read(tmp_path / "a.arrow")
    with pytest.raises(DataError, match=r"a\.arrow:1 has no source .*--source-from-folder"):
        read(tmp_path / "a.arrow", RecordKeys("body"))
    labels = RecordKeys("body", "folder")
    assert read(tmp_path / "a.arrow", labels)[0][0].source == tmp_path.name


@pytest.mark.parametrize("form", WRITERS)
def test_a_row_that_is_not_utf8_is_left_out_alone(form, tmp_path):
    texts = arrow.array([b"one", b"tw\xffo", b"three"], arrow.binary()).view(arrow.string())
    path = write(tmp_path / "a.arrow", [arrow.table({"text": texts, "source": ["x"] * 3})], form)
    found, bad, _ = read(path, skip=True)
    assert [(one.line, one.text) for one in found] == [(1, "one"), (3, "three")]
    assert [(row["line"], row["reason"][:12]) for row in bad.listed] == [(2, "is not UTF-8")]


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("legacy", [False, True])
def test_every_cut_is_found(form, legacy, tables, tmp_path):
    """Also one between two batches, where a stream looks whole."""
    path = write(tmp_path / "a.arrow", tables, form, use_legacy_format=legacy)
    content = path.read_bytes()
    cuts = {*range(len(content) - 24, len(content)), *range(1, len(content), 977)}
    if form == "stream":
        first = write(tmp_path / "first", tables[:1], form, use_legacy_format=legacy).read_bytes()
        mark = first[-4:] if legacy else first[-8:]
        assert content.startswith(first.removesuffix(mark))
        cuts.add(len(first) - len(mark))
    for cut in cuts:
        path.write_bytes(content[:cut])
        with pytest.raises(DataError, match=r"a\.arrow:\d+ cannot be read .*cut off or damaged"):
            read(path)


def test_bytes_after_the_end_of_a_stream_are_found(tables, tmp_path):
    path = write(tmp_path / "a.arrow", tables)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(DataError, match=r"a\.arrow:601 cannot be read \(.* bytes follow the end"):
        read(path)
    found, bad, _ = read(path, skip=True)
    assert len(found) == 600
    assert bad.count == 1


@pytest.mark.parametrize("form", WRITERS)
def test_flipped_bytes_give_documents_or_one_error(form, tables, tmp_path):
    path = write(tmp_path / "a.arrow", tables, form)
    content, generator = path.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        found, bad, _ = read(path, skip=True)
        assert len(found) + bad.count > 0


def test_an_offset_beyond_the_data_is_damage(tmp_path):
    path = write(
        tmp_path / "a.arrow", [arrow.table({"text": ["one", "two"], "source": ["x", "x"]})]
    )
    offsets, content = struct.pack("<3i", 0, 3, 6), path.read_bytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, struct.pack("<3i", 0, 1 << 30, 6)))
    with pytest.raises(DataError, match=r"a\.arrow:1 cannot be read"):
        read(path)


def test_a_file_of_no_rows(tmp_path):
    path = write(tmp_path / "a.arrow", [arrow.table({"text": [], "source": []})])
    assert read(path)[0] == []


def test_the_hash_and_the_position_are_those_of_the_file(tables, tmp_path):
    path = write(tmp_path / "a.arrow", tables)
    (item,), state = find_inputs([path]), FileState()
    for _ in read_documents(item, RecordKeys(), BadDocuments(), state):
        assert 0 < state.position_bytes <= item.size_bytes
    assert state.position_bytes == item.size_bytes
    assert state.xxh3_128 == ""  # made from all bytes afterwards, as of .parquet
    assert len(hash_input(item)) == 32
