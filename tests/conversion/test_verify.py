"""`--verify`: what it writes down, and what it does not let pass."""

import hashlib
import json
from dataclasses import replace

import pytest

from megatron_long.conversion import hf_folder
from megatron_long.conversion.convert import hf_to_megatron
from megatron_long.conversion.export import megatron_to_hf
from megatron_long.conversion.options import Options
from megatron_long.errors import DataError


def test_hashes_of_all_tensors_are_written(make_llama, read_weights, tmp_path):
    source = make_llama(dtype="bfloat16")
    hf_to_megatron(source, tmp_path / "ckpt", options=Options(verify=True))
    megatron_to_hf(tmp_path / "ckpt", tmp_path / "hf", options=Options(verify=True))
    records = [
        json.loads((tmp_path / name / "verification.json").read_text()) for name in ("ckpt", "hf")
    ]
    assert records[0] == records[1]
    import torch

    for name, tensor in read_weights(source).items():
        data = tensor.view(torch.uint8).numpy().tobytes()
        assert records[0]["sha256"].pop(name) == hashlib.sha256(data).hexdigest()
    assert not records[0]["sha256"]


@pytest.mark.slow
def test_a_configuration_of_another_model_is_noticed(make_llama, tmp_path, monkeypatch):
    """Every tensor is right, and RoPE in the configuration is not: only logits can tell."""
    options = Options(verify=True, check_logits=True)
    write = hf_folder.write_config

    def write_wrong(path, original, geometry, stored):
        write(path, original, replace(geometry, rotary_base=10_000.0), stored)

    source = make_llama(family="qwen2", tied=True, max_position_embeddings=4096)
    report = hf_to_megatron(source, tmp_path / "ckpt", options=options)
    assert report.logits_difference is not None
    assert report.logits_difference < 1e-5
    monkeypatch.setattr(hf_folder, "write_config", write_wrong)
    with pytest.raises(DataError, match="--verify: the logits of Megatron and transformers differ"):
        megatron_to_hf(tmp_path / "ckpt", tmp_path / "hf", options=options)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_a_flipped_bit_of_a_checkpoint_is_noticed(make_llama, tmp_path):
    hf_to_megatron(make_llama(), tmp_path / "ckpt")
    path = max((tmp_path / "ckpt/release").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"\.distcp is damaged: its hash has changed"):
        megatron_to_hf(tmp_path / "ckpt", tmp_path / "hf")
    unchecked = Options(verify=True, check_hashes=False)  # as for checkpoints of other programs
    with pytest.raises(DataError, match=r"cannot be read \(ValueError: its checksum is wrong\)"):
        megatron_to_hf(tmp_path / "ckpt", tmp_path / "hf", options=unchecked)
