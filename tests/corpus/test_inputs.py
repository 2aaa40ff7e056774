import pytest

from megatron_long.corpus.inputs import hash_input
from megatron_long.corpus.listing import find_inputs
from megatron_long.errors import ConfigError, DataError


def test_equal_names_from_several_inputs_are_kept_apart(tmp_path, write_jsonl):
    for folder in ("x", "y"):
        write_jsonl(tmp_path / folder / "a.jsonl", [])
    inputs = find_inputs([tmp_path / "x", tmp_path / "y" / "a.jsonl"])
    assert [(item.name, item.folder) for item in inputs] == [("a.jsonl", "x"), ("a.jsonl#2", "y")]


def test_missing_wrong_empty_and_repeated_inputs(tmp_path, write_jsonl):
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        find_inputs([tmp_path / "nowhere"])
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.txt has an unsupported suffix; use \.jsonl"):
        find_inputs([tmp_path / "a.txt"])
    with pytest.raises(DataError, match="holds no corpus file"):
        find_inputs([tmp_path])
    file = write_jsonl(tmp_path / "a.jsonl", [])
    with pytest.raises(DataError, match=r"a\.jsonl twice"):
        find_inputs([tmp_path, file])


def test_urls_give_the_names_of_local_paths(corpus):
    pytest.importorskip("fsspec")
    local, remote = find_inputs([corpus]), find_inputs([f"file://{corpus}"])
    assert [item.name for item in remote] == [item.name for item in local]
    assert [item.size_bytes for item in remote] == [item.size_bytes for item in local]
    assert [hash_input(item) for item in remote] == [hash_input(item) for item in local]
    one = find_inputs([f"file://{corpus}/a.jsonl"])
    assert [(item.name, item.folder) for item in one] == [("a.jsonl", corpus.name)]


def test_urls_that_lead_nowhere(tmp_path):
    pytest.importorskip("fsspec")
    with pytest.raises(DataError, match="does not exist"):
        find_inputs([f"file://{tmp_path}/none"])
    with pytest.raises(ConfigError, match="nosuchstore"):
        find_inputs(["nosuchstore://bucket/a"])
