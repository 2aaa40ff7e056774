"""Which files are read, and what becomes of the others."""

import gzip
import json
import os

import pytest

from megatron_long.corpus.listing import describe_inputs, find_inputs, list_inputs
from megatron_long.errors import DataError

LINE = b'{"text": "x", "source": "s"}\n'


def write(folder, *names, content=LINE):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def names(*roots, **more):
    return [item.name for item in find_inputs(roots, **more)]


def reasons(folder, **more):
    return {
        path.removeprefix(f"{folder}/"): reason
        for path, reason, _ in list_inputs([folder], **more).skipped
    }


def test_every_name_of_json_lines_is_read(tmp_path):
    kinds = (".jsonl", ".json", ".ndjson")
    found = sorted(f"a{kind}{end}" for kind in (*kinds, ".JSONL") for end in ("", ".gz", ".zst"))
    write(tmp_path, *found)
    assert names(tmp_path) == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("b.jsonl.bz2", "is of a kind that cannot be read; .*convert it to one of"),
        ("b.parquet.gz", "is of a kind that cannot be read"),
        ("b.csv", "is of a kind that cannot be read"),
        ("b.warc.gz", "is of a kind that cannot be read"),
        ("b.tar.zst", "is of a kind that cannot be read"),
        ("b.jsonl.gz.part", "is part of an unfinished download; .*finish or remove it"),
        ("json/0.0.0.incomplete/b.arrow", "is part of an unfinished download"),
        ("blobs/0a1b.incomplete", "is part of an unfinished download"),
    ],
)
def test_documents_are_not_lost_without_a_word(name, message, tmp_path):
    write(tmp_path, "a.jsonl", name)
    with pytest.raises(
        DataError, match=f"{name.replace('.', '[.]')} {message}.* --on-unread-file skip"
    ):
        find_inputs([tmp_path])
    assert names(tmp_path, skip_unread=True) == ["a.jsonl"]
    assert list(reasons(tmp_path, skip_unread=True)) == [name]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.zst", ".parquet", ".arrow"])
def test_a_file_of_no_bytes_is_a_failed_download(suffix, tmp_path):
    write(tmp_path, "a.jsonl")
    write(tmp_path, f"b{suffix}", content=b"")
    with pytest.raises(DataError, match=r"is empty \(0 bytes\).*fetch it again"):
        find_inputs([tmp_path])
    assert names(tmp_path, skip_unread=True) == ["a.jsonl"]


def test_empty_files_of_lines_are_files_without_documents(tmp_path):
    write(tmp_path, "a.jsonl", "d.jsonl.gz", content=gzip.compress(b""))
    write(tmp_path, "b.json", "c.ndjson", content=b"")
    assert len(names(tmp_path)) == 4
    assert next(describe_inputs(list_inputs([tmp_path]))).endswith("4 files, 0.0 MB, 2 empty")


@pytest.mark.parametrize(
    "content",
    [
        LINE * 2,
        b"\xef\xbb\xbf\n" + LINE,
        b'{"text": "' + b"x" * 100_000 + b'"}\n',
        b"{damaged\n",  # told when it is read, with its line
    ],
)
def test_a_json_file_of_lines_is_read(content, tmp_path):
    write(tmp_path, "b.json", content=content)
    assert names(tmp_path) == ["b.json"]


def test_a_json_file_of_one_value_is_not_read(tmp_path):
    write(tmp_path, "a.jsonl")
    write(tmp_path, "stats.json", content=json.dumps({"files": 3}, indent=1).encode())
    assert names(tmp_path) == ["a.jsonl"]
    assert reasons(tmp_path) == {"stats.json": "is one JSON object over several lines"}
    write(tmp_path, "b.json", content=json.dumps([{"text": "x"}], indent=1).encode())
    with pytest.raises(DataError, match=r"b\.json is a JSON array; .*one object a line"):
        find_inputs([tmp_path])


def test_other_kinds_are_listed(tmp_path):
    write(
        tmp_path, "Book/a.jsonl", "Book/b.json.gz", "C4/c.jsonl", "README.md", "C4/c.jsonl.md5", "x"
    )
    listing = list_inputs([tmp_path])
    size = sum(item.size_bytes for item in listing.files) / 1e6
    assert list(describe_inputs(listing)) == [
        f"--input: 3 files, {size:.1f} MB",
        "  Book: 2 files, 0.0 MB (.json.gz, .jsonl)",
        "  C4: 1 file, 0.0 MB (.jsonl)",
        "not read: 1 x README.md: is of another kind (.md)",
        "not read: 1 x c.jsonl.md5: is of another kind (.md5)",
        "not read: 1 x x: is of another kind (no suffix)",
    ]


def saved(folder, *listed, indices=None):
    """The layout of `Dataset.save_to_disk`, with what `map` leaves there."""
    state = {"_data_files": [{"filename": name} for name in listed], "_fingerprint": "0"}
    state |= {"_indices_data_files": indices}
    write(folder, *listed, "cache-0123.arrow")
    write(folder, "dataset_info.json", content=b'{"citation": ""}')
    write(folder, "state.json", content=json.dumps(state, indent=2).encode())


PARTS = ("data-00000-of-00002.arrow", "data-00001-of-00002.arrow")


def test_saved_datasets_are_their_parts(tmp_path):
    write(tmp_path, "dataset_dict.json", content=b'{"splits": ["train", "test"]}')
    saved(tmp_path / "train", *PARTS)
    saved(tmp_path / "test", "dataset.arrow")
    assert names(tmp_path) == ["test/dataset.arrow", *(f"train/{name}" for name in PARTS)]
    assert names(f"file://{tmp_path}") == names(tmp_path)
    told = reasons(tmp_path)
    assert told["train/cache-0123.arrow"] == "is not part of the dataset (state.json)"
    assert told["dataset_dict.json"] == "describes a dataset of Hugging Face"
    (tmp_path / "train" / PARTS[1]).unlink()
    with pytest.raises(DataError, match=rf"{PARTS[1]} is missing \(state.json lists it\)"):
        find_inputs([tmp_path])


def test_a_saved_dataset_may_name_its_parts_as_caches_are_named(tmp_path):
    saved(tmp_path, "cache-0123.arrow")
    assert names(tmp_path) == ["cache-0123.arrow"]


def test_a_selection_of_rows_is_not_read_as_all_rows(tmp_path):
    saved(tmp_path, "dataset.arrow", indices=[{"filename": "indices.arrow"}])
    with pytest.raises(DataError, match=r"is a selection of the rows .*flatten_indices"):
        find_inputs([tmp_path])


def test_caches_are_left_out_of_a_cache_folder_and_read_if_named(tmp_path):
    write(
        tmp_path, "json-train.arrow", "cache-0123.arrow", "cache-4_00000_of_00002.arrow", "x.lock"
    )
    write(tmp_path, "state.json", content=b"{}")  # of another program
    assert names(tmp_path) == ["json-train.arrow"]
    assert names(tmp_path / "cache-0123.arrow") == ["cache-0123.arrow"]


def test_a_list_of_files_is_taken_as_given(tmp_path):
    saved(tmp_path, *PARTS)
    assert names(tmp_path / PARTS[1], tmp_path / PARTS[0]) == list(PARTS)
    with pytest.raises(
        DataError, match=r"state\.json holds no corpus file .*describes a dataset of"
    ):
        find_inputs([tmp_path / PARTS[0], tmp_path / "state.json"])
    with pytest.raises(DataError, match=rf"{PARTS[0]} twice"):
        find_inputs([tmp_path / PARTS[0], tmp_path / PARTS[0]])


def test_links_are_followed_once(tmp_path):
    corpus, outside = tmp_path / "in", tmp_path / "outside"
    write(corpus, "Book/a.jsonl")
    write(outside, "b.jsonl", "deep/c.jsonl")
    links = {
        "Book/again.jsonl": "a.jsonl",
        "All": "Book",
        "loop": ".",
        "Book/up": "..",
        "Web": outside,
        "Web2": outside / "deep",
        "z.jsonl": outside / "b.jsonl",
    }
    for name, target in links.items():
        (corpus / name).symlink_to(target)
    (outside / "back").symlink_to(corpus)
    assert names(corpus) == ["Book/a.jsonl", "Web/b.jsonl", "Web/deep/c.jsonl"]
    assert set(reasons(corpus)) == {
        *("Book/again.jsonl", "All", "loop", "Book/up", "Web2", "z.jsonl", "Web/back")
    }
    assert set(reasons(corpus).values()) == {"is read under another name"}
    assert {item.folder for item in find_inputs([corpus])} == {"Book", "Web"}
    (tmp_path / "link").symlink_to(corpus)
    assert names(tmp_path / "link") == names(corpus)
    with pytest.raises(DataError, match=r"Web/b\.jsonl twice \(it is .*outside/b\.jsonl\)"):
        find_inputs([outside / "b.jsonl", corpus])


def test_the_cache_of_the_hub_is_read_through_its_links(tmp_path):
    write(tmp_path, "blobs/0a1b", "blobs/2c3d")
    for number, revision in enumerate(("1111", "2222")):
        folder = tmp_path / "snapshots" / revision / "data"
        folder.mkdir(parents=True)
        (folder / "train-00000.parquet").symlink_to("../../../blobs/0a1b")
        (folder / f"new-{number}.parquet").symlink_to("../../../blobs/2c3d")
    assert names(tmp_path) == [
        "snapshots/1111/data/new-0.parquet",
        "snapshots/1111/data/train-00000.parquet",
    ]


def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch):
    write(tmp_path, "a.jsonl", "b.jsonl", "folder.parquet/part-0.parquet")
    assert names(tmp_path)[-1] == "folder.parquet/part-0.parquet"
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "lost.jsonl").symlink_to("nowhere")
    (tmp_path / "lost.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    write(tmp_path, os.fsdecode(b"caf\xe9.jsonl"))
    monkeypatch.setattr(os, "access", lambda path, mode: not path.endswith("b.jsonl"))
    told = reasons(tmp_path, skip_unread=True)
    assert "broken link (Too many levels" in told["loop.jsonl"]
    assert "broken link (No such file" in told["lost.jsonl"]
    assert told["lost.txt"] == "is of another kind (.txt)"
    assert told["pipe.jsonl"] == "is not a file"
    assert told["b.jsonl"] == "cannot be read (permission denied)"
    assert told["caf\\udce9.jsonl"] == "has a name that is not UTF-8"
    assert names(tmp_path, skip_unread=True) == ["a.jsonl", "folder.parquet/part-0.parquet"]
    with pytest.raises(DataError, match=r"\(4 more are not read, such as"):
        find_inputs([tmp_path])


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write(tmp_path, "a.jsonl", "secret/b.jsonl")
    listed = os.listdir

    def listdir(folder):
        if str(folder).endswith("secret"):
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(DataError, match=r"secret cannot be listed \(Permission denied\)"):
        find_inputs([tmp_path])


ODD = [
    "a b.jsonl",
    "#1?x=%20&.jsonl",
    "[x]*.jsonl",
    "new\nline.jsonl",
    "~.jsonl",
    "ü€.jsonl",
    "-.jsonl",
]


@pytest.mark.parametrize("kind", ["", "file://"])
def test_odd_names_are_opened(kind, tmp_path):
    from megatron_long.corpus.inputs import hash_input

    if kind:
        pytest.importorskip("fsspec")
    write(tmp_path, *ODD)
    items = find_inputs([f"{kind}{tmp_path}"])
    assert [item.name for item in items] == sorted(ODD)
    assert len({hash_input(item) for item in items}) == 1


def test_a_remote_store_is_listed_as_a_folder_is():
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for name in ("Book/a.json.gz", "C4/b.ndjson", "README.md", "C4/c.csv", "C4/d::e.jsonl"):
        store.pipe_file(f"/bucket/{name}", LINE)
    try:
        with pytest.raises(DataError, match=r"c\.csv is of a kind .*\(1 more"):
            find_inputs(["memory://bucket"])
        assert names("memory://bucket", skip_unread=True) == ["Book/a.json.gz", "C4/b.ndjson"]
    finally:
        store.store.clear()


def test_a_linked_folder_below_a_url_is_named(tmp_path):
    pytest.importorskip("fsspec")
    write(tmp_path, "in/a.jsonl", "outside/b.jsonl")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="link is a link to a folder, not followed in a URL"):
        find_inputs([f"file://{tmp_path}/in"])
