"""RoPE and context: asked for when a checkpoint is made, read from it when it is exported."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_long.conversion.convert import hf_to_megatron
from megatron_long.conversion.export import megatron_to_hf
from megatron_long.conversion.stretch import Stretch
from megatron_long.errors import ConfigError
from megatron_long.model.geometry import geometry_from_hf
from megatron_long.model.rope import BaseRope, LinearRope, Llama3Rope, YarnRope
from tests.fake_checkpoints import read_geometry


@pytest.mark.parametrize(
    ("stretch", "rope", "length"),
    [
        (Stretch(rope_theta=2e6, context_length=4096), BaseRope(), 4096),
        (Stretch(rope_method="linear", context_length=2048), LinearRope(factor=4), 2048),
        (
            Stretch(rope_method="yarn", rope_factor=8),
            YarnRope(factor=8, original_max_position_embeddings=512),
            4096,
        ),
        (
            Stretch(rope_method="llama3", rope_factor=8, rope_original_length=512),
            Llama3Rope(factor=8, original_max_position_embeddings=512),
            4096,
        ),
    ],
)
def test_a_stretch_goes_through_the_checkpoint(make_llama, tmp_path, stretch, rope, length):
    """Into Megatron's arguments, and from them into both spellings of transformers' configuration."""
    from transformers import AutoConfig

    source = make_llama()
    hf_to_megatron(source, tmp_path / "ckpt", stretch=stretch)
    base = stretch.rope_theta or 500_000.0
    expected = replace(
        geometry_from_hf(source), rope=rope, rotary_base=base, max_position_embeddings=length
    )
    assert read_geometry(tmp_path / "ckpt") == expected
    megatron_to_hf(tmp_path / "ckpt", tmp_path / "hf", stretch=stretch)
    assert geometry_from_hf(tmp_path / "hf") == expected
    config = json.loads((tmp_path / "hf/config.json").read_text())
    scaling = None if rope == BaseRope() else rope.to_hf()
    assert (config["rope_theta"], config["rope_scaling"]) == (base, scaling)  # transformers 4
    seen = AutoConfig.from_pretrained(tmp_path / "hf")
    assert seen.rope_parameters == {**rope.to_hf(), "rope_theta": base}  # transformers 5
    assert (seen.max_position_embeddings, config["torch_dtype"]) == (length, config["dtype"])


@pytest.mark.parametrize(
    ("stretch", "message"),
    [
        (Stretch(rope_theta=10_000.0), "rotary_base 500000.0, and the flags .* says? 10000.0"),
        (Stretch(rope_method="yarn", rope_factor=2), "trained with rope BaseRope"),
        (Stretch(context_length=128), "max_position_embeddings 512, and the flags .* 128"),
    ],
)
def test_an_export_of_another_rope_is_refused(make_llama, tmp_path, stretch, message):
    hf_to_megatron(make_llama(), tmp_path / "ckpt")
    with pytest.raises(ConfigError, match=message):
        megatron_to_hf(tmp_path / "ckpt", tmp_path / "hf", stretch=stretch)


def test_a_file_that_says_otherwise_is_refused(make_llama, tmp_path):
    hf_to_megatron(make_llama(), tmp_path / "ckpt")
    path = tmp_path / "ckpt/hf_config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 10_000.0
    path.write_text(json.dumps(config))
    (tmp_path / "ckpt/hashes.json").unlink()  # the change is meant
    with pytest.raises(ConfigError, match=r"hf_config.json says 10000.0; .*give --hf-config"):
        megatron_to_hf(tmp_path / "ckpt", tmp_path / "hf")
    model = Path(shutil.copytree(make_llama(), tmp_path / "model"))
    megatron_to_hf(tmp_path / "ckpt", tmp_path / "hf", hf_config=model)
    assert geometry_from_hf(tmp_path / "hf").rotary_base == 500_000.0


@pytest.mark.parametrize(
    ("stretch", "message"),
    [
        (Stretch(rope_factor=2.0), "belong to --rope-method"),
        (
            Stretch(rope_method="yarn"),
            "needs --context-length, the tokens to reach, or --rope-factor",
        ),
        (Stretch(context_length=0), "--context-length 0 must be 1 or more"),
        (Stretch(rope_method="ntk", context_length=1024), "--rope-method ntk is unknown"),
    ],
)
def test_flags_that_do_not_go_together(make_llama, stretch, message):
    with pytest.raises(ConfigError, match=message):
        stretch.apply(geometry_from_hf(make_llama()))
