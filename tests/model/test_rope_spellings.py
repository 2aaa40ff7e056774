"""Every spelling of RoPE in `config.json`: what `transformers` makes of it, or an error that names the keys.

The matrix is generated from the values that each key may have, in both spellings, with each of the families.
transformers 5 itself is asked. Of transformers 4, which cannot be installed along, `read_by_4` states the
rules as they stand in its 4.57 (`LlamaConfig.__init__`, `modeling_rope_utils.py`).
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_long.errors import ConfigError
from megatron_long.model.families import FAMILIES
from megatron_long.model.geometry import geometry_from_config, geometry_from_hf

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "sliding_window": None,
}
MISSING = object()
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
METHODS: list[Any] = [
    MISSING,
    None,
    {},
    {"rope_type": "default"},
    {"type": "linear", "factor": 4.0},
    {"rope_type": "linear", "type": "linear", "factor": 2},
    {"rope_type": "yarn", "factor": 4.0},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 1024},
    {"rope_type": "llama3", **LLAMA3},
]
THETAS: list[Any] = [MISSING, 10_000.0, 500_000]
ORIGINALS: list[Any] = [MISSING, 1024, 2048]


def spellings() -> Iterator[dict[str, Any]]:
    """Both objects, the base in up to three places, the original length outside of them."""
    for old, new, theta, inner, original in itertools.product(
        METHODS, METHODS, THETAS, (*THETAS, 1_000_000), ORIGINALS
    ):
        config: dict[str, Any] = {}
        for key, value in (("rope_scaling", old), ("rope_parameters", new)):
            if value is not MISSING:
                config[key] = dict(value) if value else value
        if inner is not MISSING:
            section = next((s for s in ("rope_parameters", "rope_scaling") if config.get(s)), None)
            if section is None:
                continue
            config[section]["rope_theta"] = inner
        if theta is not MISSING:
            config["rope_theta"] = theta
        if original is not MISSING:
            config["original_max_position_embeddings"] = original
        yield config


PARTIAL_YARN: list[dict[str, Any]] = [
    {"rope_type": "yarn", "factor": 4.0, **change}
    for change in (
        {"beta_fast": 16, "beta_slow": 2.0},
        {"beta_fast": None, "beta_slow": 0},
        {"truncate": False},
        {"truncate": None},
        {"truncate": True},
        {"attention_factor": 1.25},
        {"attention_factor": None},
        {"mscale": 1.0},
        {"mscale": 0.8, "mscale_all_dim": 0.5},
        {"mscale": 0.8, "mscale_all_dim": 0},
        {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"factor": None, "original_max_position_embeddings": 512},
        {"factor": 8, "original_max_position_embeddings": 1024},  # not the ratio of the lengths
        {"factor": 1.0},
    )
]


def written(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """A whole configuration of a family."""
    family = next(family for family in FAMILIES if family.model_type == model_type)
    named = {"model_type": model_type, "architectures": [family.architecture]}
    return json.loads(json.dumps({**BASE, **named, **config}))


def read_by_5(config: dict[str, Any]) -> tuple[torch.Tensor, float] | None:
    """Frequencies and attention scaling of transformers itself; None where it has an error."""
    from transformers import AutoConfig, AutoModel

    try:
        loaded = AutoConfig.for_model(**json.loads(json.dumps(config)))
        with torch.device("meta"):
            kind = type(AutoModel.from_config(loaded).rotary_emb)
        rotary = kind(loaded)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return rotary.inv_freq, float(rotary.attention_scaling)


def read_by_4(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4.57 takes of a configuration in its own spelling."""
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("type", scaling.get("rope_type", "default"))
    original = scaling.get("original_max_position_embeddings") or BASE["max_position_embeddings"]
    return {
        "rope_type": kind,
        "rope_theta": config.get("rope_theta", 10_000.0),
        "original": original if kind in ("yarn", "llama3") else None,
    }


def our_reading(config: dict[str, Any]) -> tuple[torch.Tensor, float]:
    geometry = geometry_from_config(config)
    frequencies = geometry.rope.inverse_frequencies(geometry.rotary_base, geometry.kv_channels)
    return frequencies, geometry.rope.attention_scaling


def check(config: dict[str, Any], seen: dict[str, int]) -> None:
    """Ours is that of transformers 5, or refused with the keys that disagree."""
    expected, refusal = read_by_5(config), ""
    try:
        frequencies, scaling = our_reading(config)
    except ConfigError as error:
        refusal = str(error)
    if refusal:
        seen["refused"] += 1
        keys = [key for key in config if key.startswith(("rope", "original"))]
        assert any(key in refusal for key in keys), (config, refusal)
        return
    assert expected is not None, config
    seen["read"] += 1
    torch.testing.assert_close(frequencies, expected[0], rtol=1e-6, atol=0)
    assert scaling == pytest.approx(expected[1], rel=1e-9)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_the_matrix(model_type):
    configs = list(spellings())
    step = 1 if model_type == "llama" else 7
    seen = {"read": 0, "refused": 0}
    for config in configs[::step]:
        check(written(config, model_type), seen)
    print(model_type, seen)
    assert min(seen.values()) > 100 / step


@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
def test_partial_keys_of_yarn(section):
    seen = {"read": 0, "refused": 0}
    for parameters in PARTIAL_YARN:
        check(written({section: parameters, "rope_theta": 500_000.0}, "llama"), seen)
    assert seen == {"read": len(PARTIAL_YARN), "refused": 0}


def test_nothing_is_refused_without_a_reason():
    """Where only one object is given, bases agree and no length stands twice, there is nothing to refuse."""
    for config in spellings():
        objects = [config[k] for k in ("rope_scaling", "rope_parameters") if config.get(k)]
        thetas = {config.get("rope_theta")} | {item.get("rope_theta") for item in objects}
        lengths = {config.get("original_max_position_embeddings")}
        lengths |= {item.get("original_max_position_embeddings") for item in objects}
        if len(objects) < 2 and len(thetas - {None}) < 2 and len(lengths - {None}) < 2:
            geometry_from_config(written(config, "llama"))


def test_what_both_versions_read_alike_is_that():
    """The spelling of transformers 4 is read as there, but for what 4 does not know."""
    count = 0
    for config in spellings():
        if config.get("rope_parameters") or (config.get("rope_scaling") or {}).get("rope_theta"):
            continue
        scaling = config.get("rope_scaling") or {}
        if "original_max_position_embeddings" in config and not scaling.get(
            "original_max_position_embeddings"
        ):
            continue  # transformers 4 knows it inside alone
        try:
            geometry = geometry_from_config(written(config, "llama"))
        except ConfigError:
            continue
        by_4 = read_by_4(config)
        rope = geometry.rope
        assert (rope.hf_type, geometry.rotary_base) == (by_4["rope_type"], by_4["rope_theta"])
        assert getattr(rope, "original_max_position_embeddings", None) == by_4["original"]
        count += 1
    assert count > 50


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN},
            "rope_parameters.rope_theta is 1,000,000; next to rope_scaling transformers ignores it and "
            "uses 10,000: put it into rope_scaling",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": YARN},
            "two RoPE methods; keep the one that is intended and remove the other",
        ),
        (
            {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta is 1,000,000 and rope_parameters.rope_theta is 500,000; keep the right one",
        ),
        (
            {"original_max_position_embeddings": 2048, "rope_scaling": YARN},
            "original_max_position_embeddings is 2048 and rope_scaling.original_max_position_embeddings is "
            "1024; transformers 5 uses the former and 4 the latter: keep the right one",
        ),
        (
            {"rope_scaling": {**YARN, "rope_type": "linear"}},
            "rope_scaling.rope_type is 'linear' and rope_scaling.type is 'yarn'; transformers 5 uses the "
            "former and 4 the latter",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "the same for all layers",
        ),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; it must be one object"),
        ({"rope_theta": None}, "rope_theta is None; it must be a number"),
        ({"rope_scaling": {"type": "yarn", "factor": True}}, "factor is True; it must be a number"),
        (
            {
                "original_max_position_embeddings": None,
                "rope_scaling": {"type": "yarn", "factor": 2},
            },
            "original_max_position_embeddings is None; it must be a number above 0",
        ),
    ],
)
def test_what_disagrees_is_named(config, words):
    with pytest.raises(ConfigError) as refused:
        geometry_from_config(written(config, "llama"))
    assert words in str(refused.value)


def test_a_stretch_as_model_cards_tell(tmp_path):
    """`rope_scaling` added to what transformers 5 saved: the base stays only where it is said again."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        **{key: value for key, value in BASE.items() if key != "sliding_window"},
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    config.save_pretrained(tmp_path)
    path = Path(tmp_path) / "config.json"
    saved = json.loads(path.read_text())
    assert saved["rope_parameters"]["rope_theta"] == 1e6
    for added, base in (({"rope_theta": 1e6}, 1e6), ({}, None)):
        saved.update(architectures=["LlamaForCausalLM"], rope_scaling={**YARN, **added})
        path.write_text(json.dumps(saved))
        if base is None:
            with pytest.raises(ConfigError, match=r"rope_parameters\.rope_theta is 1,000,000"):
                geometry_from_hf(tmp_path)
        else:
            geometry = geometry_from_hf(tmp_path)
            assert (geometry.rope.method, geometry.rotary_base) == ("yarn", base)


def test_every_export_is_read_alike(tmp_path):
    """What is written in all three spellings: transformers and ours read the model that was trained."""
    for config in spellings():
        try:
            geometry = geometry_from_config(written(config, "llama"))
        except ConfigError:
            continue
        exported = geometry.to_hf_config()
        assert geometry_from_config(exported) == geometry
        check(exported, {"read": 0, "refused": 0})
