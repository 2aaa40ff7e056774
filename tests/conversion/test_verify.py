"""`--verify`: what it writes down, and what it does not let pass."""

import hashlib
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_long.conversion.convert import hf_to_megatron
from megatron_long.conversion.export import megatron_to_hf
from megatron_long.conversion.formats import hf_folder, sources
from megatron_long.conversion.options import Options
from megatron_long.conversion.stretch import Stretch
from megatron_long.errors import DataError
from megatron_long.model.rope import PLAIN_ROPE
from megatron_long.model.rope_hf import ORIGINAL_LENGTH


def test_hashes_of_all_tensors_are_written(make_llama, read_weights, tmp_path):
    source = make_llama(dtype="bfloat16")
    hf_to_megatron(source, tmp_path / "ckpt", options=Options(verify=True))
    megatron_to_hf(tmp_path / "ckpt", tmp_path / "hf", options=Options(verify=True))
    records = [
        json.loads((tmp_path / name / "verification.json").read_text()) for name in ("ckpt", "hf")
    ]
    assert records[0] == records[1]
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


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500000.0}


@pytest.mark.slow
def test_the_input_is_compared_as_transformers_loads_it(make_llama, tmp_path, monkeypatch):
    """A YaRN that the conversion does not see is in no rewritten configuration: only the input's tells."""
    options = Options(verify=True, check_logits=True)
    source = Path(shutil.copytree(make_llama(tied=True), tmp_path / "hf"))
    config = json.loads((source / "config.json").read_text())
    written = json.dumps({**config, "rope_scaling": {**YARN, ORIGINAL_LENGTH: 128}})
    (source / "config.json").write_text(written)
    report = hf_to_megatron(source, tmp_path / "ckpt", options=options)
    assert report.geometry.rope.method == "yarn"
    assert report.logits_difference < 1e-5
    stretch = Stretch(rope_theta=2_000_000, context_length=4096)
    report = hf_to_megatron(source, tmp_path / "stretched", stretch=stretch, options=options)
    assert report.logits_difference < 1e-5
    read = sources.read_source_geometry

    def read_without_scaling(path):
        return replace(read(path), rope=PLAIN_ROPE)

    monkeypatch.setattr(sources, "read_source_geometry", read_without_scaling)
    with pytest.raises(DataError, match=r"transformers reads another model from config.json than"):
        hf_to_megatron(source, tmp_path / "plain", options=options)
    assert not (tmp_path / "plain").exists()


@pytest.mark.slow
def test_an_original_length_outside_reaches_the_export(make_llama, tmp_path):
    """Left there, transformers 5 would take it over that of the RoPE that was trained."""
    options = Options(verify=True, check_logits=True)
    source = Path(shutil.copytree(make_llama(), tmp_path / "hf"))
    config = json.loads((source / "config.json").read_text())
    written = json.dumps({**config, "rope_scaling": YARN, ORIGINAL_LENGTH: 128})
    (source / "config.json").write_text(written)
    stretch = Stretch(rope_method="yarn", rope_factor=32, rope_original_length=256)
    for name, changed, length in (("as it is", None, 128), ("stretched", stretch, 256)):
        report = hf_to_megatron(source, tmp_path / name, stretch=changed, options=options)
        assert report.geometry.rope.original_length(0) == length
        exported = megatron_to_hf(tmp_path / name, tmp_path / f"{name} back", options=options)
        assert exported.logits_difference < 1e-5
        assert ORIGINAL_LENGTH not in json.loads(
            (tmp_path / f"{name} back/config.json").read_text()
        )


@pytest.mark.slow
def test_flipped_bytes_are_found_without_hashes(make_llama, read_weights, tmp_path, caplog):
    """Whatever byte of the tensors and objects changes: the same model comes out, or none."""
    hf_to_megatron(make_llama(), tmp_path / "ckpt")
    for path in (tmp_path / "ckpt").rglob("hashes.json"):
        path.unlink()
    expected = read_weights(make_llama())
    generator, refused = random.Random(0), 0
    paths = sorted((tmp_path / "ckpt/release").glob("*.distcp"))
    for _ in range(150):
        path = generator.choice(paths)
        whole = path.read_bytes()
        content = bytearray(whole)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        try:
            megatron_to_hf(tmp_path / "ckpt", tmp_path / "hf", options=Options(force=True))
        except DataError:
            refused += 1
        else:
            found = read_weights(tmp_path / "hf")
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        path.write_bytes(whole)
    print(f"{refused} of 150 are refused; the others lie in bytes that say nothing")
    assert refused > 100
    assert "release has no hashes.json: each tensor is compared with the checksum" in caplog.text


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
