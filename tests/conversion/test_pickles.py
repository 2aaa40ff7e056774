"""Pickled weights: on request only, as tensors alone, and every damage named."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_long.conversion.convert import hf_to_megatron
from megatron_long.conversion.export import megatron_to_hf
from megatron_long.conversion.options import Options
from megatron_long.errors import ConfigError, DataError

ALLOWED = Options(allow_pickle=True, verify=True)


class Harmful:
    """Leaves a file when it is unpickled without care."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("harmed"),)


@pytest.fixture
def pickled(make_llama, read_weights, tmp_path) -> Path:
    """A model whose weights are one pickle."""
    folder = tmp_path / "pickled"
    shutil.copytree(make_llama(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(read_weights(make_llama()), folder / "pytorch_model.bin")
    return folder


def test_read_on_request_only(pickled, make_llama, read_weights, tmp_path):
    with pytest.raises(
        ConfigError, match=r"only pickled weights \(pytorch_model.bin\).*can run code"
    ):
        hf_to_megatron(pickled, tmp_path / "ckpt")
    hf_to_megatron(pickled, tmp_path / "ckpt", options=ALLOWED)
    megatron_to_hf(tmp_path / "ckpt", tmp_path / "hf")
    before, after = read_weights(make_llama()), read_weights(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_sharded(pickled, read_weights, make_llama, tmp_path):
    weights = read_weights(make_llama())
    halves = list(weights)[::2], list(weights)[1::2]
    files = {name: f"pytorch_model-{i}.bin" for i, names in enumerate(halves) for name in names}
    for i, names in enumerate(halves):
        torch.save({name: weights[name] for name in names}, pickled / f"pytorch_model-{i}.bin")
    (pickled / "pytorch_model.bin").unlink()
    index = pickled / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    hf_to_megatron(pickled, tmp_path / "ckpt", options=ALLOWED)
    (pickled / "pytorch_model-1.bin").unlink()
    with pytest.raises(DataError, match=r"names pytorch_model-1\.bin, which is missing"):
        hf_to_megatron(pickled, tmp_path / "other", options=ALLOWED)


def test_code_is_not_run(pickled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model.norm.weight": Harmful()}, pickled / "pytorch_model.bin")
    with pytest.raises(DataError, match="cannot be read as weights only"):
        hf_to_megatron(pickled, tmp_path / "ckpt", options=ALLOWED)
    assert not (tmp_path / "harmed").exists()


def test_a_cut_pickle_is_named(pickled, tmp_path):
    path = pickled / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DataError, match=r"pytorch_model\.bin cannot be read as weights only"):
        hf_to_megatron(pickled, tmp_path / "ckpt", options=ALLOWED)


def test_safetensors_come_first(make_llama, tmp_path):
    folder = Path(shutil.copytree(make_llama(), tmp_path / "both"))
    torch.save({"model.norm.weight": Harmful()}, folder / "pytorch_model.bin")
    hf_to_megatron(folder, tmp_path / "ckpt", options=ALLOWED)
