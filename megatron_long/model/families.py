"""The Llama-like families: their names in Hugging Face, and their differences in Megatron.

All are one `GPTModel`; a family is a row here. Sizes are never written down: they come from `config.json`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_long.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of transformers."""

    architecture: str
    model_type: str
    add_qkv_bias: bool = False
    """Whether the projections to queries, keys and values have a bias."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers assumes for keys missing in `config.json`, if it differs from Llama."""


FAMILIES = (
    Family(architecture="LlamaForCausalLM", model_type="llama"),
    Family(
        architecture="MistralForCausalLM",
        model_type="mistral",
        defaults={
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "max_position_embeddings": 131_072,
        },
    ),
    Family(
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        add_qkv_bias=True,
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32_768},
    ),
)
"""Llama 2, 3, 3.1, 3.2 and SmolLM2 are the first; Qwen2 and Qwen2.5 the last."""


def find_family(config: Mapping[str, Any], name: str) -> Family:
    """Return the family of a parsed `config.json`.

    Args:
        config: What the file holds.
        name: What to call it in errors.
    Raises: ConfigError: no family, or architecture and model type name two; lists those known.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise ConfigError(f"{name}: architectures is {architectures!r}; it must be a list of names")
    model_type = config.get("model_type")
    for family in FAMILIES:
        is_named = architectures[:1] == [family.architecture] or not architectures
        if is_named and model_type in (family.model_type, None) and (architectures or model_type):
            return family
    seen = ", ".join([*architectures, *([f"model_type {model_type}"] if model_type else [])])
    known = ", ".join(f"{family.architecture} ({family.model_type})" for family in FAMILIES)
    raise ConfigError(f"{name}: unknown architecture {seen or 'nothing'}; known: {known}")


def family_of_type(model_type: str) -> Family:
    """Return the family of a model type that is known to be one."""
    return next(family for family in FAMILIES if family.model_type == model_type)


def family_of_flags(*, add_qkv_bias: bool) -> Family:
    """Return the first family that matches Megatron's flags exactly."""
    return next(family for family in FAMILIES if family.add_qkv_bias == add_qkv_bias)


def refuse_unsupported(config: Mapping[str, Any], family: Family, name: str) -> None:
    """Reject options that change the arithmetic in a way that Megatron's layers here do not compute.

    Raises: ConfigError: names the key, its value and what it must be.
    """
    rules: dict[str, tuple[object, ...]] = {
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "hidden_act": ("silu", "swish", None),
        "quantization_config": (None,),
    }
    for key, allowed in rules.items():
        if config.get(key) not in allowed:
            raise ConfigError(
                f"{name}: {key} is {config[key]!r}; {family.architecture} is supported with "
                f"{allowed[0]!r} only; use a model without it"
            )
    _refuse_binding_window(config, name)


def _refuse_binding_window(config: Mapping[str, Any], name: str) -> None:
    """A window as long as the longest context never hides a token; a shorter one does."""
    window = config.get("sliding_window")
    is_on = config.get("use_sliding_window", True)
    longest = config.get("max_position_embeddings")
    if window is None or not is_on or (longest is not None and window >= longest):
        return
    raise ConfigError(
        f"{name}: sliding_window is {window} of max_position_embeddings {longest}, so the model does "
        "not attend to all tokens, and training here always does; to train the model with full "
        f'attention, set "sliding_window": null in {name} (the result is the same up to {window} '
        "tokens)"
    )
