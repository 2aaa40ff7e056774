"""RoPE methods against transformers' own functions, and against what Megatron-Core makes of the flags."""

from dataclasses import replace

import pytest
import torch

from megatron_long.engine import host_backend
from megatron_long.errors import ConfigError
from megatron_long.flags.recipe import LLAMA3_8B, build_recipe
from megatron_long.model.geometry import LlamaGeometry, geometry_from_args, geometry_from_config
from megatron_long.model.rope import BaseRope, LinearRope, Llama3Rope, YarnRope
from megatron_long.model.rope_stretch import stretch_rope

host_backend.install()

# ruff: noqa: E402
from megatron_long.engine.megatron_adapter import build_model_config, parse_flags
from megatron_long.flags.relations import check_rope

POSITIONS = 4096
METHODS = {
    "base": BaseRope(),
    "linear": LinearRope(factor=16),
    "llama3": Llama3Rope(),
    "llama3-llama2": Llama3Rope(factor=32, original_max_position_embeddings=4096),
    "llama3-bounds": Llama3Rope(low_freq_factor=2, high_freq_factor=8),
    "yarn": YarnRope(factor=16, original_max_position_embeddings=8192),
    "yarn-plain-attention": YarnRope(factor=32, original_max_position_embeddings=4096, mscale=0),
    "yarn-others": YarnRope(
        factor=2.5,
        original_max_position_embeddings=4096,
        beta_fast=16,
        beta_slow=2,
        mscale=0.7,
        truncate=False,
    ),
}


def geometry_with(rope: BaseRope) -> LlamaGeometry:
    return replace(LLAMA3_8B, rope=rope, num_layers=1, max_position_embeddings=131_072)


def transformers_frequencies(config: dict) -> tuple[torch.Tensor, float]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    embedding = LlamaRotaryEmbedding(LlamaConfig(**config))
    return embedding.inv_freq, embedding.attention_scaling


def megatron_frequencies(geometry: LlamaGeometry, monkeypatch) -> tuple[torch.Tensor, float]:
    """Cosines' angles [s, d/2] and their scaling, from Megatron's classes with its configuration."""
    from megatron.core.models.common.embeddings import rotary_pos_embedding as plain
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn

    monkeypatch.setattr(
        plain.RotaryEmbedding, "_apply_scaling", plain.RotaryEmbedding._apply_scaling
    )  # what build_model_config may replace comes back
    flags = [*build_recipe("tiny_debug").to_argv(backend=host()), *geometry.to_argv()]
    args = parse_flags([*flags, "--seq-length", "4096"])
    args.params_dtype, args.padded_vocab_size = torch.float32, geometry.padded_vocab_size
    args.add_position_embedding, args.sequence_parallel = True, False
    config = build_model_config(args)
    common = {"kv_channels": config.kv_channels, "rotary_percent": 1.0, "cp_group": None}
    common["rotary_base"] = config.rotary_base
    if config.position_embedding_type == "yarn":
        names = "original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim "
        names += "correction_range_round_to_int"
        values = {name: getattr(config, f"yarn_{name}") for name in names.split()}
        scaling = config.yarn_rotary_scaling_factor
        embedding = yarn.YarnRotaryEmbedding(scaling_factor=scaling, **common, **values)
        angles, _ = embedding.get_emb(POSITIONS)
        factor = yarn._yarn_get_concentration_factor_from_config(config)
    else:
        embedding = plain.RotaryEmbedding(
            seq_len_interpolation_factor=config.seq_len_interpolation_factor,
            rope_scaling=config.rope_scaling,
            rope_scaling_factor=config.rope_scaling_factor,
            **common,
        )
        angles, factor = embedding.get_emb(POSITIONS), 1.0
    return angles[:, 0, 0, : config.kv_channels // 2], factor


def host():
    from megatron_long.flags.backend import HOST

    return HOST


@pytest.mark.parametrize("name", METHODS)
def test_frequencies_are_those_of_transformers(name):
    geometry = geometry_with(METHODS[name])
    expected, scaling = transformers_frequencies(geometry.to_hf_config())
    seen = geometry.rope.inverse_frequencies(geometry.rotary_base, geometry.kv_channels)
    torch.testing.assert_close(seen, expected, rtol=2e-7, atol=0)
    assert geometry.rope.attention_scaling == pytest.approx(scaling, rel=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_megatron_computes_these_frequencies(name, monkeypatch):
    geometry = geometry_with(METHODS[name])
    angles, scaling = megatron_frequencies(geometry, monkeypatch)
    frequencies = geometry.rope.inverse_frequencies(geometry.rotary_base, geometry.kv_channels)
    expected = torch.outer(torch.arange(POSITIONS, dtype=torch.float32), frequencies)
    torch.testing.assert_close(angles, expected, rtol=5e-7, atol=0)
    assert scaling == pytest.approx(geometry.rope.attention_scaling, rel=1e-12)


def test_methods_differ():
    """The comparisons above are of different things."""
    frequencies = [rope.inverse_frequencies(500_000, 128) for rope in METHODS.values()]
    scalings = [rope.attention_scaling for rope in METHODS.values()]
    for i, one in enumerate(frequencies):
        for j in range(i):
            assert scalings[i] != scalings[j] or not torch.allclose(one, frequencies[j], rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_flags_and_configuration_read_back(name):
    geometry = geometry_with(METHODS[name])
    assert geometry_from_config(geometry.to_hf_config()).rope == geometry.rope
    args = parse_flags(geometry.to_argv())
    check_rope(args)
    assert geometry_from_args(args).rope == geometry.rope


def test_old_spelling_and_yarn_without_length_are_taken():
    config = geometry_with(BaseRope()).to_hf_config()
    del config["rope_parameters"]
    config["rope_scaling"] = {"type": "yarn", "factor": 4.0}
    config["max_position_embeddings"] = 32_768
    rope = geometry_from_config(config).rope
    assert rope == YarnRope(factor=4.0, original_max_position_embeddings=32_768)


def test_what_no_flag_can_carry_is_refused():
    with pytest.raises(ConfigError, match=r"factor 2\.5 is not a whole number"):
        geometry_with(LinearRope(factor=2.5)).to_argv()
    for flags, words in (
        (["--use-rope-scaling", "--rotary-seq-len-interpolation-factor", "2"], "are two RoPE"),
        (["--rotary-percent", "0.5"], "--rotary-percent 0.5"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_rope(parse_flags(["--position-embedding-type", "rope", *flags]))


@pytest.mark.parametrize("method", ["linear", "yarn", "llama3"])
def test_a_stretched_model_stretches_to_itself(method):
    once = stretch_rope(LLAMA3_8B, 131_072, method)
    assert stretch_rope(once, 131_072, method) == once
    assert once.rope.factor == 16
    assert (once.rotary_base, once.max_position_embeddings) == (500_000, 131_072)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"method": "ntk"},
            "--rope-method ntk is unknown; choose one of base, linear, yarn, llama3",
        ),
        ({"method": "base", "factor": 2.0}, "takes neither --rope-factor"),
        ({"method": "yarn", "factor": 2.0}, "reaches 16384, less than --seq-length 131072"),
        ({"method": "llama3", "factor": 0.5}, "factor is 0.5; it must be 1 or more"),
        ({"method": "yarn", "original_length": -1}, "--rope-original-length -1"),
    ],
)
def test_bad_stretches_are_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        stretch_rope(LLAMA3_8B, 131_072, **arguments)


def test_a_scaled_model_keeps_its_base_in_a_recipe():
    """Llama-3.1 is not stretched twice; the recipe's base is for models without a scaling."""
    recipe = build_recipe("llama3_8b_128k", replace(LLAMA3_8B, rope=Llama3Rope()))
    argv = recipe.to_argv(host())
    assert argv[argv.index("--rotary-base") + 1] == "500000"
    assert "--use-rope-scaling" in argv
