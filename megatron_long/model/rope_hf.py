"""RoPE of a Hugging Face `config.json`, read as `transformers` reads it, or rejected if keys disagree.

The keys, and how the versions use them:

- `rope_parameters`, which transformers 5 writes: method and base in one object.
- `rope_scaling`, of transformers 4: the method, as `rope_type` or `type`. If it is present, transformers 5
  uses it instead of all of `rope_parameters`, including its base.
- `rope_theta`: the base; transformers 5 prefers one within the object that it takes. Default 10,000.
- `original_max_position_embeddings` outside of both: for YaRN and Llama-3's method, transformers 5 uses it
  instead of the one inside; transformers 4 reads the one inside.

Source: `transformers` 5.23, `modeling_rope_utils.py` (`convert_rope_params_to_dict`,
`standardize_rope_params`, `ROPE_INIT_FUNCTIONS`); `transformers` 4.57, `modeling_rope_utils.py` and
`LlamaConfig`: `rope_parameters` is unknown there, and `type` overrides `rope_type`.
"""

import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megatron_long.errors import ConfigError
from megatron_long.model.rope import METHODS, PLAIN_ROPE, BaseRope, attention_scaling, find_mscale

DEFAULT_BASE = 10_000.0
OLD, NEW = "rope_scaling", "rope_parameters"
ORIGINAL_LENGTH = "original_max_position_embeddings"
_LARGEST = 1 << 62
"""Upper limit of any length or factor: beyond it 64-bit integers, as in transformers, overflow."""
_TYPES_WITH_ORIGINAL_LENGTH = ("yarn", "llama3")


def read_rope(
    config: Mapping[str, Any], max_position_embeddings: int, name: str
) -> tuple[float, BaseRope]:
    """Return the RoPE base, and how RoPE is scaled.

    Args:
        config: What `config.json` holds.
        max_position_embeddings: The configuration's, or its default.
        name: What to call the file in errors.
    Raises: ConfigError: keys that contradict each other, a method that no flag of Megatron stands for, or a
        value that is missing or no number.
    """
    old, new = (_section(config, key, name) for key in (OLD, NEW))
    taken, parameters = (OLD, old) if old else (NEW, new)
    base = _read_base(config, taken, name)
    rope = _read_method(config, taken, parameters, max_position_embeddings, name)
    if old and new:
        other = _read_method(config, NEW, new, max_position_embeddings, name)
        if other not in (rope, PLAIN_ROPE):
            raise ConfigError(
                f"{name}: {OLD} is {_shown(old)} and {NEW} is {_shown(new)}, two RoPE methods; keep the one "
                f"that is intended and remove the other (transformers takes {OLD})"
            )
    for key, share in _everywhere(config, "partial_rotary_factor").items():
        if share is not None and share != 1.0:
            raise ConfigError(f"{name}: {key} is {share}; it must be 1.0")
    return base, rope


def _section(config: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any]:
    """Return one of the two objects; empty if it is missing, null or empty: transformers ignores it."""
    section = config.get(key) or {}
    nested = isinstance(section, Mapping) and any(isinstance(v, Mapping) for v in section.values())
    if not isinstance(section, Mapping) or nested:
        raise ConfigError(
            f"{name}: {key} is {section!r}; it must be one object of values, the same for all layers"
        )
    return section


def _everywhere(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return what a key is, outside and in both objects, under names that say where."""
    found = {key: config[key]} if key in config else {}
    for section in (OLD, NEW):
        if key in (config.get(section) or {}):
            found[f"{section}.{key}"] = config[section][key]
    return found


def _read_base(config: Mapping[str, Any], taken: str, name: str) -> float:
    given = _everywhere(config, "rope_theta")
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name}: {key} is {value!r}; it must be a number")
    base = float(given.get(f"{taken}.rope_theta", given.get("rope_theta", DEFAULT_BASE)))
    if any(value != base for value in given.values()):
        listed = " and ".join(f"{key} is {value:,.12g}" for key, value in given.items())
        ends = "keep the right one"
        if len(given) == 1:
            ends = f"next to {OLD} transformers ignores it and uses {base:,.12g}: put it into {OLD}"
        raise ConfigError(f"{name}: {listed}; {ends}")
    return base


def _read_method(
    config: Mapping[str, Any],
    section: str,
    parameters: Mapping[str, Any],
    max_position_embeddings: int,
    name: str,
) -> BaseRope:
    """Read the method of one object."""
    both = [parameters[key] for key in ("rope_type", "type") if key in parameters]
    if len(set(both)) > 1:
        raise ConfigError(
            f"{name}: {section}.rope_type is {both[0]!r} and {section}.type is {both[1]!r}; transformers 5 "
            "uses the former and 4 the latter: keep one of them"
        )
    hf_type = both[0] if both else "default"
    by_type = {kind.hf_type: kind for kind in METHODS.values()}
    if hf_type not in by_type:
        raise ConfigError(
            f"{name}: RoPE scaling {_shown(parameters)} is not supported; supported rope_type: "
            f"{', '.join(by_type)}"
        )
    known = {ORIGINAL_LENGTH: max_position_embeddings, **parameters}
    if hf_type in _TYPES_WITH_ORIGINAL_LENGTH and ORIGINAL_LENGTH in config:
        known[ORIGINAL_LENGTH] = _original_length(config, section, name)
    what = f"{name}: RoPE scaling {_shown(parameters)}"
    if hf_type == "yarn":
        known = _with_yarn_defaults(known, max_position_embeddings, what)
    values = {}
    for field in fields(by_type[hf_type]):
        if known.get(field.name) is None:
            raise ConfigError(f"{what} lacks {field.name}")
        is_free = field.name in ("mscale", "truncate")
        values[field.name] = (
            known[field.name] if is_free else _positive(known[field.name], field.name, what)
        )
    return by_type[hf_type](**values)


def _original_length(config: Mapping[str, Any], section: str, name: str) -> Any:
    """The one outside of both objects, which must not contradict the one inside."""
    inside = config[section].get(ORIGINAL_LENGTH, config[ORIGINAL_LENGTH])
    if inside != config[ORIGINAL_LENGTH]:
        raise ConfigError(
            f"{name}: {ORIGINAL_LENGTH} is {config[ORIGINAL_LENGTH]} and {section}.{ORIGINAL_LENGTH} is "
            f"{inside}; transformers 5 uses the former and 4 the latter: keep the right one"
        )
    return inside


def _with_yarn_defaults(
    given: Mapping[str, Any], max_position_embeddings: int, what: str
) -> dict[str, Any]:
    """Fill in transformers' defaults for YaRN parameters that are missing, null or 0."""
    known = dict(given)
    if ORIGINAL_LENGTH in known:
        original = _positive(known[ORIGINAL_LENGTH], ORIGINAL_LENGTH, what)
        if "factor" in known and known["factor"] is None:
            known["factor"] = max_position_embeddings / original
    known["beta_fast"] = known.get("beta_fast") or 32.0
    known["beta_slow"] = known.get("beta_slow") or 1.0
    known["truncate"] = bool(known.get("truncate", True))
    if known.get("factor") is None:
        raise ConfigError(f"{what} lacks factor")
    factor = _positive(known["factor"], "factor", what)
    scaling = known.get("attention_factor")
    if scaling is None:
        both = known.get("mscale"), known.get("mscale_all_dim")
        weights = both if all(both) else (1.0, 0.0)
        over, under = (check_number(weight, "mscale", what) for weight in weights)
        scaling = attention_scaling(factor, over, under)
    known["mscale"] = find_mscale(factor, check_number(scaling, "attention_factor", what))
    return known


def check_number(value: Any, key: str, what: str) -> float:
    """Return a value of a configuration, which must be a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{what}: {key} is {value!r}; it must be a number")
    if not abs(value) <= sys.float_info.max:  # NaN, infinity, or a whole number beyond both
        raise ConfigError(f"{what}: {key} is {value!r:.40}; it must be a finite number")
    return value


def _positive(value: Any, key: str, what: str) -> float:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
    if 0 < number <= _LARGEST:
        return number
    raise ConfigError(
        f"{what}: {key} is {value!r}; it must be a number above 0, at most {_LARGEST:,}"
    )


def _shown(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key != "rope_theta"}
