"""Where a run reads and writes: what would be read or removed by mistake is refused, before any work."""

import dataclasses
import os
from pathlib import Path

import pytest

from megatron_long.dataset.manifest import read_manifest
from megatron_long.errors import ConfigError
from megatron_long.mixture.mixture import Mixture
from megatron_long.preprocess import preprocess_config
from megatron_long.preprocess.preprocess import preprocess
from megatron_long.preprocess.preprocess_config import PreprocessConfig

MIXTURE = Mixture(train_tokens=2000, strategy="original", valid_tokens_per_source=500)


@pytest.fixture
def config(tmp_path, model_file, records, write_jsonl):
    write_jsonl(tmp_path / "data" / "in" / "a.jsonl", records)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    return PreprocessConfig(
        inputs=[tmp_path / "data" / "in"], tokenizer=model_file, mixture=MIXTURE, engine="reference"
    )


@pytest.mark.parametrize(
    ("output", "work"),
    [
        ("data/in", None),
        ("data/in/out", None),
        ("data", None),
        ("link/in/out", None),
        ("link", None),
        ("out", "data/in"),
        ("out", "data/in/work"),
        ("out", "data"),
        ("out", "link"),
        ("out", "out"),
        ("out", "out/work"),
        ("out/a", "out"),
    ],
)
def test_folders_inside_one_another_are_refused(output, work, config, tmp_path, records):
    """Also with --force, which would remove the corpus with the folder that it replaces."""
    before = sorted(tmp_path.rglob("*"))
    work_dir = tmp_path / work if work else None
    forced = dataclasses.replace(config, work_dir=work_dir, force=True)
    with pytest.raises(ConfigError, match="are one folder, or one lies in the other"):
        preprocess(forced, tmp_path / output)
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_next_to_one_another_are_not_nested(config, tmp_path):
    work = tmp_path / "data" / "in.work"
    preprocess(dataclasses.replace(config, work_dir=work), tmp_path / "data" / "in2")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["in", "in2"]


def test_a_work_folder_of_something_else_is_not_removed(config, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    mine = dataclasses.replace(config, work_dir=tmp_path / "mine", force=True)
    with pytest.raises(ConfigError, match=r"holds files of something else \(thesis.tex\)"):
        preprocess(mine, tmp_path / "out")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    (tmp_path / "empty").mkdir()
    preprocess(dataclasses.replace(config, work_dir=tmp_path / "empty"), tmp_path / "out")


@pytest.mark.parametrize("kind", ["file", "broken link", "below a file", "mount", "read-only"])
def test_an_output_that_cannot_be_made_is_refused_before_the_work(
    kind, config, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    if kind == "file":
        output.touch()
    elif kind == "broken link":
        output.symlink_to("nowhere")
    elif kind == "below a file":
        (tmp_path / "file").touch()
        output = tmp_path / "file" / "out"
    elif kind == "mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: path == output)
    else:  # root may write to any folder
        monkeypatch.setattr(preprocess_config.os, "access", lambda path, mode: False)
    config = dataclasses.replace(config, work_dir=tmp_path / "work", force=True)
    with pytest.raises(ConfigError, match=r"^--output .*; give "):
        preprocess(config, output)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("has_dataset", [False, True])
def test_a_link_stays_and_leads_to_the_dataset(has_dataset, config, tmp_path):
    (tmp_path / "scratch").mkdir()
    output = tmp_path / "out"
    output.symlink_to(tmp_path / "scratch")
    if has_dataset:
        (output / "old").touch()
    manifest = preprocess(dataclasses.replace(config, force=has_dataset), output)
    assert output.is_symlink()
    assert read_manifest(Path(os.path.realpath(output))) == manifest
    assert not (output / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "link", "out", "scratch"]
