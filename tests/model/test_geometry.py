"""Reading a Llama's shape from `config.json`, and the Megatron flags it becomes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_long.errors import ConfigError
from megatron_long.model.geometry import HF_CONFIG_NAME, geometry_from_config, geometry_from_hf
from megatron_long.model.rope import Llama3Rope

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def test_both_spellings_of_the_rope_base_give_one_geometry(tmp_path: Path) -> None:
    old = {**CONFIG, "rope_theta": 500000.0, "rope_scaling": None}
    new = {**CONFIG, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    geometries = []
    for name, config in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        geometries.append(geometry_from_hf(tmp_path / name))
    assert geometries[0] == geometries[1]
    assert geometries[0].rotary_base == 500000.0
    assert (geometries[0].vocab_size, geometries[0].padded_vocab_size) == (1000, 1024)
    assert geometries[0].kv_channels == 16


def test_flags_name_every_size() -> None:
    geometry = geometry_from_config({**CONFIG, "rope_theta": 1e6, "head_dim": 32})
    argv = geometry.to_argv()
    for flag, value in {
        "--num-layers": "2",
        "--hidden-size": "64",
        "--ffn-hidden-size": "96",
        "--num-attention-heads": "4",
        "--num-query-groups": "2",
        "--kv-channels": "32",
        "--padded-vocab-size": "1024",
        "--rotary-base": "1000000",
        "--norm-epsilon": "1e-05",
        "--max-position-embeddings": "512",
    }.items():
        assert argv[argv.index(flag) + 1] == value
    assert "--untie-embeddings-and-output-weights" in argv
    assert "--use-rope-scaling" not in argv
    tied = replace(geometry, tie_embeddings=True)
    assert "--untie-embeddings-and-output-weights" not in tied.to_argv()


def test_key_value_heads_default_to_attention_heads() -> None:
    config = {key: value for key, value in CONFIG.items() if key != "num_key_value_heads"}
    assert geometry_from_config(config).num_query_groups == 4


def test_llama3_scaling_is_taken() -> None:
    rope = Llama3Rope().to_hf()
    geometry = geometry_from_config({**CONFIG, "rope_theta": 5e5, "rope_scaling": rope})
    assert geometry.rope == Llama3Rope()
    assert "--use-rope-scaling" in geometry.to_argv()
    wider = geometry_from_config({**CONFIG, "rope_scaling": {**rope, "factor": 32.0}})
    argv = wider.to_argv()
    assert argv[argv.index("--rope-scaling-factor") + 1] == "32.0"
    assert wider.to_hf_config()["rope_scaling"]["factor"] == 32.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM, .*; known: LlamaForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "unknown architecture model_type gpt2"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "qwen2"}, "unknown architecture"),
        ({"architectures": None, "model_type": None}, "unknown architecture nothing"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "supported rope_type: default, lin"),
        ({"rope_scaling": {"type": "linear"}}, "RoPE scaling .*linear.* lacks factor"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            "factor is 0.5; it must be 1 or more",
        ),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "is '2'; it must be a number"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "RoPE scaling .*yarn.* lacks factor"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.5}},
            "only 1 and above",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot be shared by 3"),
        ({"num_attention_heads": 0, "num_key_value_heads": 1}, "num_attention_heads is 0"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"rope_theta": -1.0}, "rotary_base is -1.0"),
        ({"rope_theta": float("inf")}, "rotary_base is inf"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; it must be a finite number"),
        ({"initializer_range": float("nan")}, "initializer_range is nan; it must be a finite"),
        ({"architectures": 5}, "architectures is 5; it must be a list of names"),
        ({"architectures": [None]}, "it must be a list of names"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "number above 0, at most"),
        ({"rope_scaling": {"type": "linear", "factor": 10**30}}, "number above 0, at most"),
    ],
)
def test_what_megatron_cannot_stand_for_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        geometry_from_config({**CONFIG, **change})


def test_a_fractional_base_has_no_flag() -> None:
    geometry = geometry_from_config({**CONFIG, "rope_theta": 2100000.5})
    with pytest.raises(ConfigError, match=r"2100000\.5 is not a whole number"):
        geometry.to_argv()


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        geometry_from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        geometry_from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="is not JSON"):
        geometry_from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must be a JSON object"):
        geometry_from_hf(tmp_path)


QWEN2 = {**CONFIG, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MISTRAL = {**CONFIG, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_each_family_comes_back(family: str) -> None:
    config = {**CONFIG, "architectures": None, "model_type": family, "sliding_window": None}
    geometry = geometry_from_config(config)
    assert ("--add-qkv-bias" in geometry.to_argv()) == (family == "qwen2")
    assert geometry_from_config(geometry.to_hf_config()) == geometry


def test_keys_that_are_left_out_are_the_familys() -> None:
    """As transformers reads the same file."""
    from transformers import AutoConfig

    for config in (CONFIG, QWEN2, {**MISTRAL, "sliding_window": None}):
        short = {key: config[key] for key in config if key != "num_key_value_heads"}
        short |= {"num_attention_heads": 64, "hidden_size": 64, "head_dim": 2}
        short.pop("max_position_embeddings")
        seen = geometry_from_config(short)
        expected = AutoConfig.for_model(**short)
        assert seen.num_query_groups == expected.num_key_value_heads
        assert seen.max_position_embeddings == expected.max_position_embeddings


@pytest.mark.parametrize(
    ("config", "binds"),
    [
        ({**MISTRAL, "sliding_window": 256}, True),
        ({**MISTRAL, "max_position_embeddings": 32_768}, True),  # left out, it is 4096
        ({**MISTRAL, "sliding_window": 512}, False),
        ({**MISTRAL, "sliding_window": None}, False),
        ({**QWEN2, "sliding_window": 256, "use_sliding_window": True}, True),
        ({**QWEN2, "sliding_window": 256, "use_sliding_window": False}, False),
    ],
)
def test_a_window_that_would_hide_tokens_is_refused(config: dict[str, Any], binds: bool) -> None:
    if not binds:
        longer = replace(geometry_from_config(config), max_position_embeddings=131_072)
        written = {**config, **longer.to_hf_config()}
        assert written["sliding_window"] is None
        assert geometry_from_config(written) == longer
        return
    with pytest.raises(ConfigError, match=r"sliding_window is \d+ of max_position_.*null"):
        geometry_from_config(config)


def test_a_folder_of_checkpoints_is_named(tmp_path: Path) -> None:
    (tmp_path / HF_CONFIG_NAME).write_text("{}")
    with pytest.raises(
        ConfigError, match=r"holds Megatron checkpoints: .*hf_config\.json describes"
    ):
        geometry_from_hf(tmp_path)


def test_a_file_of_weights_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"is not JSON: .*; give the folder that contains it"):
        geometry_from_hf(tmp_path / "model.safetensors")
