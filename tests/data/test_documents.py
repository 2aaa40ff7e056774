from pathlib import Path

import pytest

from megatron_long.data.documents import (
    Document,
    LineBatch,
    RecordKeys,
    canonical_source,
    find_inputs,
    parse_documents,
    read_batches,
)
from megatron_long.errors import DataError


def read_all(folder: Path, batch_bytes: int = 1 << 20) -> list[tuple[str, int, str]]:
    batches = read_batches(find_inputs([folder]), batch_bytes=batch_bytes)
    return [
        (batch.name, line, document.text)
        for batch in batches
        for (line, _), document in zip(
            batch.lines, parse_documents(batch, RecordKeys()), strict=True
        )
    ]


def parse(line: bytes, keys: RecordKeys | None = None) -> Document:
    batch = LineBatch(0, "a.jsonl", Path("dir/a.jsonl"), [(7, line)])
    return parse_documents(batch, keys or RecordKeys())[0]


def test_reads_plain_gzip_and_zstandard_in_name_order(corpus, records):
    found = read_all(corpus)
    assert [text for _, _, text in found] == [record["text"] for record in records]
    assert [name for name, line, _ in found if line == 1] == [
        "a.jsonl",
        "sub/b.jsonl.gz",
        "sub/c.jsonl.zst",
    ]
    assert [line for name, line, _ in found if name == "a.jsonl"] == list(range(1, 251))


def test_batch_size_changes_nothing(corpus):
    assert read_all(corpus, batch_bytes=1) == read_all(corpus)


def test_progress_adds_up_to_the_size_of_the_files(corpus):
    inputs, seen = find_inputs([corpus]), []
    for _ in read_batches(inputs, batch_bytes=1000, on_progress=seen.append):
        pass
    assert sum(seen) == sum(item.path.stat().st_size for item in inputs)


def test_blank_lines_are_skipped_but_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '\n{"text": "x", "meta": {"redpajama_set_name": "s"}}\n  \n\n', encoding="utf-8"
    )
    assert read_all(tmp_path) == [("a.jsonl", 2, "x")]


def test_nested_and_top_level_keys_and_canonical_sources():
    line = b'{"body": {"raw": "hi"}, "source": "RedPajamaGithub"}'
    assert parse(line, RecordKeys(text="body.raw", source="source")) == Document("hi", "GitHub")
    assert canonical_source("RedPajamaStackExchange") == "StackExchange"
    assert canonical_source("my/label") == "my/label"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json}", r"dir/a\.jsonl:7 is not JSON"),
        (b'{"text": "\xff"}', r"dir/a\.jsonl:7 is not JSON"),
        (b'["text"]', r"dir/a\.jsonl:7 has no text string at 'text' \(it is no object\)"),
        (b'{"meta": {"redpajama_set_name": "x"}}', r"a\.jsonl:7 has no text .* keys are meta"),
        (b'{"text": null, "meta": {}}', r"a\.jsonl:7 has no text .*--text-key"),
        (b'{"text": "x", "meta": {}}', r"a\.jsonl:7 has no source .*--source-key"),
        (b'{"text": "x", "meta": "y"}', r"a\.jsonl:7 has no source"),
    ],
)
def test_bad_lines_name_file_and_line(line, message):
    with pytest.raises(DataError, match=message):
        parse(line)


def test_equal_names_from_several_inputs_are_kept_apart(tmp_path, write_jsonl):
    for folder in ("x", "y"):
        write_jsonl(tmp_path / folder / "a.jsonl", [])
    inputs = find_inputs([tmp_path / "x", tmp_path / "y" / "a.jsonl"])
    assert [(item.name, item.path.parent.name) for item in inputs] == [
        ("a.jsonl", "x"),
        ("a.jsonl#2", "y"),
    ]


def test_missing_wrong_empty_and_repeated_inputs(tmp_path, write_jsonl):
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        find_inputs([tmp_path / "nowhere"])
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.txt has a suffix that is not read; use \.jsonl"):
        find_inputs([tmp_path / "a.txt"])
    with pytest.raises(DataError, match="holds no corpus file"):
        find_inputs([tmp_path])
    file = write_jsonl(tmp_path / "a.jsonl", [])
    with pytest.raises(DataError, match=r"a\.jsonl twice"):
        find_inputs([tmp_path, file])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_compressed_files_are_named(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"this is no compressed file" * 10)
    with pytest.raises(DataError, match=rf"a\.jsonl\{suffix}:1 cannot be read"):
        read_all(tmp_path)


@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.jsonl.zst"])
def test_cut_off_compressed_files_are_named(name, tmp_path, corpus):
    content = (corpus / "sub" / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"{name}:\d+ cannot be read .*cut off or damaged"):
        read_all(tmp_path)


def test_several_zstandard_frames_are_one_file(tmp_path, corpus):
    content = (corpus / "sub" / "c.jsonl.zst").read_bytes()
    (tmp_path / "a.jsonl.zst").write_bytes(content * 3)
    assert [line for _, line, _ in read_all(tmp_path)] == list(range(1, 601))
