import errno
import gzip
import io
import json
import os
from pathlib import Path

import pytest

from megatron_long.corpus.documents import (
    BadDocuments,
    Document,
    FileState,
    RecordKeys,
    canonical_source,
    parse_line,
    read_documents,
)
from megatron_long.corpus.inputs import InputFile, hash_input
from megatron_long.corpus.listing import find_inputs
from megatron_long.errors import DataError


def read_all(folder, keys=None, *, skip=False):
    """Give (name, line, text) of every document, and what was bad."""
    found, bad = [], BadDocuments(skip)
    for item in find_inputs([folder]):
        for batch in read_documents(item, keys or RecordKeys(), bad, FileState()):
            found += [(item.name, document.line, document.text) for document in batch]
    return found, bad


def parse(line: bytes, keys: RecordKeys | None = None) -> Document:
    return parse_line(line, InputFile("a.jsonl", "dir/a.jsonl", 0), 7, keys or RecordKeys())


def record(text="x", source="s"):
    return {"text": text, "meta": {"redpajama_set_name": source}}


def test_reads_plain_gzip_and_zstandard_in_name_order(corpus, records):
    found, _ = read_all(corpus)
    assert [text for _, _, text in found] == [record["text"] for record in records]
    assert [name for name, line, _ in found if line == 1] == [
        "a.jsonl",
        "sub/b.jsonl.gz",
        "sub/c.jsonl.zst",
    ]
    assert [line for name, line, _ in found if name == "a.jsonl"] == list(range(1, 251))


def test_batch_size_changes_nothing(corpus):
    item, found = find_inputs([corpus])[0], []
    for batch_bytes in (1, 1 << 20):
        state = FileState(batch_bytes=batch_bytes)
        batches = list(read_documents(item, RecordKeys(), BadDocuments(), state))
        found.append([document for batch in batches for document in batch])
        assert (len(batches) > 200) == (batch_bytes == 1)
    assert found[0] == found[1]


def test_state_ends_at_the_size_and_the_hash_of_the_file(corpus):
    for item in find_inputs([corpus]):
        state = FileState()
        for _ in read_documents(item, RecordKeys(), BadDocuments(), state):
            assert 0 < state.position_bytes <= item.size_bytes
        assert state.position_bytes == item.size_bytes == Path(item.path).stat().st_size
        assert state.xxh3_128 == hash_input(item)


def test_blank_lines_are_skipped_but_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"\n{json.dumps(record())}\n  \n\n", encoding="utf-8")
    assert read_all(tmp_path)[0] == [("a.jsonl", 2, "x")]


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_byte_order_marks_are_no_part_of_a_line(compress, tmp_path):
    """Files from Windows begin with one, and so does each part where such files were joined."""
    part = f"{json.dumps(record('a'))}\r\n{json.dumps(record('b'))}\r\n".encode("utf-8-sig")
    name = "a.jsonl" + ".gz" * (compress is gzip.compress)
    (tmp_path / name).write_bytes(compress(part * 2))
    assert read_all(tmp_path)[0] == [(name, line, text) for line, text in enumerate("abab", 1)]


def test_missing_labels_name_both_remedies(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}')
    with pytest.raises(DataError, match=r"has no source .*--source-key .*--source-from-folder"):
        read_all(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b'{"source": "x"}')
    with pytest.raises(DataError, match=r"has no text .*--text-key") as error:
        read_all(tmp_path)
    assert "--source-from-folder" not in str(error.value)


def test_keys_of_text_and_source():
    line = b'{"body": {"raw": "hi"}, "source": "RedPajamaGithub"}'
    assert parse(line, RecordKeys("body.raw", "source")) == Document("hi", "GitHub", 7)
    assert canonical_source("RedPajamaStackExchange") == "StackExchange"
    assert canonical_source("my/label") == "my/label"


def test_by_default_the_label_is_in_meta_or_at_the_top():
    assert parse(b'{"text": "x", "source": "wiki"}').source == "wiki"
    both = b'{"text": "x", "source": "a", "meta": {"redpajama_set_name": "RedPajamaBook"}}'
    assert parse(both).source == "Book"


def test_meta_kept_as_json_text_is_read():
    line = b'{"text": "x", "meta": "{\\"redpajama_set_name\\": \\"RedPajamaC4\\"}"}'
    assert parse(line).source == "C4"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json}", r"is not JSON"),
        (b'{"text": "\xff"}', r"is not JSON"),
        (b'{"text": "a\x00b", "source": "s"}', r"is not JSON"),
        (b'{"text": "\\ud800", "source": "s"}', r"is not JSON"),
        (b"\x00" * 20, r"is not JSON"),
        (b'["text"]', r"has no text string at 'text' \(it is not an object\)"),
        (b'{"meta": {"redpajama_set_name": "x"}}', r"has no text .* keys are meta"),
        (b'{"text": 5, "source": "s"}', r"has no text string at 'text' \(it is of type int\)"),
        (b'{"text": null, "meta": {}}', r"has no text .*it is null"),
        (b'{"text": "x", "meta": {}}', r"has no source .*--source-key"),
        (b'{"text": "x", "source": ""}', r"has no source .*it is empty"),
        (b'{"text": "x", "meta": "y"}', r"has no source"),
    ],
)
def test_bad_lines(line, message, tmp_path):
    with pytest.raises(ValueError, match=message) as failure:
        parse(line)
    assert len(failure.value.args) == 2
    good = json.dumps(record()).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, line, good]) + b"\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:2 {message}"):
        read_all(tmp_path)
    found, bad = read_all(tmp_path, skip=True)
    assert [line for _, line, _ in found] == [1, 3]
    assert bad.count == 1
    assert (bad.listed[0]["file"], bad.listed[0]["line"]) == ("a.jsonl", 2)


def test_a_nul_written_as_an_escape_is_text():
    assert parse(b'{"text": "a\\u0000b", "source": "s"}').text == "a\x00b"


def test_a_line_of_100_megabytes(tmp_path):
    text = "word " * 20_000_000
    (tmp_path / "a.jsonl").write_text(json.dumps(record(text)) + "\n", encoding="utf-8")
    found, _ = read_all(tmp_path)
    assert [(line, len(text)) for _, line, text in found] == [(1, 100_000_000)]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".parquet"])
def test_damaged_files_are_named(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    name = "a.parquet" if suffix == ".parquet" else f"a.jsonl{suffix}"
    (tmp_path / name).write_bytes(b"this is no compressed file" * 10)
    with pytest.raises(DataError, match=rf"{name}:1 cannot be read"):
        read_all(tmp_path)


@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.jsonl.zst"])
def test_cut_off_compressed_files(name, tmp_path, corpus, records):
    content = (corpus / "sub" / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"{name}:\d+ cannot be read .*cut off or damaged"):
        read_all(tmp_path)
    found, bad = read_all(tmp_path, skip=True)
    first = 250 if name.startswith("b") else 400
    texts = [record["text"] for record in records[first:]]
    assert [text for _, _, text in found] == texts[: len(found)]
    assert bad.count == 1
    assert "cut off" in bad.listed[0]["reason"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_disk_that_fails_is_not_a_damaged_file(name, tmp_path, monkeypatch):
    """To skip the rest of the file, as what is bad, would lose its documents."""

    class Failing(io.RawIOBase):
        def readable(self):
            return True

        def seekable(self):
            return True

        def tell(self):
            return 1000

        def readinto(self, buffer):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def seek(self, offset, whence=0):
            return 1000

    for module in ("inputs", "columnar"):
        monkeypatch.setattr(
            f"megatron_long.corpus.{module}.open_seekable", lambda *_, **__: Failing()
        )
    (tmp_path / name).write_bytes(b"x" * 1000)
    item = InputFile(name, str(tmp_path / name), 1000)
    bad = BadDocuments(skip=True)
    with pytest.raises(
        DataError, match=r"reading fails \(.*Input/output error.*same command resumes"
    ):
        list(read_documents(item, RecordKeys(), bad, FileState()))
    assert bad.count == 0


def test_several_zstandard_frames_are_one_file(tmp_path, corpus):
    content = (corpus / "sub" / "c.jsonl.zst").read_bytes()
    (tmp_path / "a.jsonl.zst").write_bytes(content * 3)
    assert [line for _, line, _ in read_all(tmp_path)[0]] == list(range(1, 601))


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_gives_what_jsonl_gives(tmp_path, records, write_jsonl, nested):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = records if nested else [{**row, "meta": json.dumps(row["meta"])} for row in records]
    rows = [{**row, "unused": "z" * 50} for row in rows]
    (tmp_path / "p").mkdir()
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "p" / "a.parquet", row_group_size=130)
    write_jsonl(tmp_path / "j" / "a.jsonl", records)
    ours, _ = read_all(tmp_path / "p")
    assert [row[1:] for row in ours] == [row[1:] for row in read_all(tmp_path / "j")[0]]


def test_folders_as_labels(tmp_path, write_jsonl):
    for name in ("RedPajamaBook/x/a.jsonl", "C4/b.jsonl"):
        write_jsonl(tmp_path / "in" / name, [{"text": "t"}])
    keys = RecordKeys(source="folder")

    def labels(*roots):
        return [
            document.source
            for item in find_inputs(roots)
            for batch in read_documents(item, keys, BadDocuments(), FileState())
            for document in batch
        ]

    assert labels(tmp_path / "in") == ["C4", "Book"]
    assert labels(tmp_path / "in" / "C4", tmp_path / "in" / "RedPajamaBook" / "x") == ["x", "C4"]
    assert labels(tmp_path / "in" / "C4" / "b.jsonl") == ["C4"]


def test_a_parquet_row_that_is_not_utf8_is_left_out_alone(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = arrow.array([b"one", b"tw\xffo", b"three"], arrow.binary()).view(arrow.string())
    table = arrow.table({"text": texts, "source": ["x", "x", "x"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    item = find_inputs([tmp_path / "a.parquet"])[0]
    bad = BadDocuments(skip=True)
    batches = list(read_documents(item, RecordKeys(), bad, FileState()))
    found = [(document.line, document.text) for batch in batches for document in batch]
    assert found == [(1, "one"), (3, "three")]
    assert [(row["line"], row["reason"][:12]) for row in bad.listed] == [(2, "is not UTF-8")]
    with pytest.raises(DataError, match=r"a\.parquet:2 is not UTF-8 .* fix or delete the row"):
        list(read_documents(item, RecordKeys(), BadDocuments(), FileState()))
