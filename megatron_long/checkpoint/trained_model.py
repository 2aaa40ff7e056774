"""The model of a resumed run: the trained one, including RoPE, not the recipe's initial one."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_long.checkpoint.choosing import has_checkpoint, newest_iteration
from megatron_long.checkpoint.sidecars import HF_CONFIG_NAME
from megatron_long.differences import differences, format_differences
from megatron_long.errors import ConfigError
from megatron_long.model.geometry import LlamaGeometry, geometry_from_hf

_NAMES = {
    "rope": "RoPE method",
    "rotary_base": "RoPE base",
    "num_layers": "--num-layers",
    "hidden_size": "--hidden-size",
    "ffn_hidden_size": "--ffn-hidden-size",
    "num_attention_heads": "--num-attention-heads",
    "num_query_groups": "--num-query-groups",
    "kv_channels": "--kv-channels",
    "norm_epsilon": "--norm-epsilon",
    "tie_embeddings": "tied embeddings",
}
"""Fields of `LlamaGeometry` that must not change."""
_SHOWN: dict[str, Callable[[Any], str]] = {
    "rope": lambda rope: json.dumps(rope.to_hf(), sort_keys=True),
    "rotary_base": lambda base: f"{base:,.12g}",
}
"""How values are formatted in messages; others as JSON."""


def trained_model(load: str | None, *, finetune: bool) -> LlamaGeometry | None:
    """Return the model of a resumed run; None at the start of a run.

    Args:
        load: `--load`.
        finetune: Whether a new run starts from its weights.
    """
    path = Path(load or "") / HF_CONFIG_NAME
    if not load or finetune or not has_checkpoint(load) or not path.is_file():
        return None
    if newest_iteration(Path(load))[0] is None:  # converted weights, which a run starts from
        return None
    return geometry_from_hf(path)


def keep_rope(model: LlamaGeometry | None, trained: LlamaGeometry) -> LlamaGeometry:
    """Return the model named for this start (None: the trained one), with the RoPE that was trained."""
    return replace(
        model or trained,
        rope=trained.rope,
        rotary_base=trained.rotary_base,
        max_position_embeddings=trained.max_position_embeddings,
    )


def check_same_model(trained: LlamaGeometry, now: LlamaGeometry, load: str) -> None:
    """Refuse to resume with a different model.

    Raises: ConfigError: names everything that differs, before and now.
    """
    if listed := _list_differences(trained, now, _NAMES):
        raise ConfigError(
            f"the model in --load {load} was trained with other flags ({listed}); drop them to resume with "
            "the model unchanged, or give --finetune (and another --save) to change it: this starts at "
            "step 0 from its weights"
        )


def check_same_shape(trained: LlamaGeometry, now: LlamaGeometry, flag: str) -> None:
    """Refuse another model as the next stage; its RoPE may change.

    Args:
        flag: The flag that names the stage before, with its value.
    Raises: ConfigError: names everything that differs, before and now.
    """
    names = [name for name in _NAMES if name not in ("rope", "rotary_base")]
    if listed := _list_differences(trained, now, names):
        raise ConfigError(
            f"{flag} trained another model ({listed}); drop these flags: its optimizer has the shape of its "
            "weights"
        )


def _list_differences(trained: LlamaGeometry, now: LlamaGeometry, names: Iterable[str]) -> str:
    return "; ".join(
        format_differences(
            [item._replace(name=_NAMES[item.name])], _SHOWN.get(item.name, json.dumps)
        )
        for item in differences(vars(trained), vars(now), names)
    )
