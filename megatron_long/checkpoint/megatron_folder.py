"""Megatron checkpoint folders: iteration, arguments and model.

    DIR/latest_checkpointed_iteration.txt   an iteration, or `release` for converted weights
    DIR/release/ or DIR/iter_0000010/       `torch_dist`
    DIR/hf_generation_config.json           if the model has one

`megatron_long.checkpoint.sidecars` describes the other files. On export RoPE and
the longest context are those of the checkpoint's own arguments, which a copied file cannot override.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_long.checkpoint.sidecars import HF_CONFIG_NAME
from megatron_long.errors import ConfigError, DataError
from megatron_long.model.geometry import LlamaGeometry
from megatron_long.model.mapping import EXTRA_STATE_MODULES, RULES, checkpoint_shape, rules_of
from megatron_long.model.rope import PLAIN_ROPE_ARGUMENTS, rope_from_arguments

if TYPE_CHECKING:
    from torch import dtype

    from megatron_long.checkpoint.torch_dist import TorchDistReader

logger = logging.getLogger(__name__)

CHECKPOINT_VERSION = 3.0

_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.", "mtp.")
"""Prefix of the keys of a model's tensors; those of the optimizer and others are ignored."""

WEIGHTS = ("auto", "model", "main")
"""Which weights to export or evaluate: `main` is the optimizer's copy in float32, `model` the model's own,
`auto` the former if FP8 rounded the latter."""

MAIN_PREFIXES = ("optimizer.state.param.", "optimizer.state.fp32_param.")
"""Prefixes of the fully reshardable format, and of the others."""

_FIXED_ARGUMENTS = {
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "add_bias_linear": False,
    "swiglu": True,
    "normalization": "RMSNorm",
    "qk_layernorm": False,
    "num_experts": None,
}
"""Arguments that are the same for every family."""


def make_arguments(geometry: LlamaGeometry, stored: dtype) -> Namespace:
    """Return the arguments that Megatron reads back with `--use-checkpoint-args` and on loading.

    Source: Megatron-Core 0.19.2, `megatron/training/checkpointing.py`,
        `load_args_from_checkpoint`, `check_checkpoint_args`, `load_checkpoint`.
    """
    import torch

    base = geometry.rotary_base
    return Namespace(
        **_FIXED_ARGUMENTS,
        num_layers=geometry.num_layers,
        hidden_size=geometry.hidden_size,
        ffn_hidden_size=geometry.ffn_hidden_size,
        num_attention_heads=geometry.num_attention_heads,
        num_query_groups=geometry.num_query_groups,
        group_query_attention=True,
        kv_channels=geometry.kv_channels,
        seq_length=geometry.max_position_embeddings,
        max_position_embeddings=geometry.max_position_embeddings,
        add_position_embedding=True,
        use_rotary_position_embeddings=False,
        rotary_base=int(base) if base.is_integer() else base,
        add_qkv_bias=geometry.add_qkv_bias,
        **(PLAIN_ROPE_ARGUMENTS | geometry.rope.to_arguments()),
        layernorm_epsilon=geometry.norm_epsilon,
        init_method_std=geometry.init_method_std,
        untie_embeddings_and_output_weights=not geometry.tie_embeddings,
        squared_relu=False,
        apply_layernorm_1p=False,
        apply_query_key_layer_scaling=False,
        attention_dropout=geometry.attention_dropout,
        hidden_dropout=0.0,
        vocab_size=geometry.vocab_size,
        padded_vocab_size=geometry.padded_vocab_size,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        expert_model_parallel_size=1,
        params_dtype=stored,
        bf16=stored == torch.bfloat16,
        fp16=stored == torch.float16,
        ckpt_format="torch_dist",
        no_save_optim=True,
        no_save_rng=True,
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
    )


def common_state(geometry: LlamaGeometry, stored: dtype) -> dict[str, Any]:
    """Return the content of a converted checkpoint other than tensors."""
    return {
        "args": make_arguments(geometry, stored),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


def extra_states(geometry: LlamaGeometry) -> dict[str, None]:
    """Return the empty FP8 states that Megatron's modules ask for, by their keys in the checkpoint."""
    states: dict[str, None] = {}
    for module in EXTRA_STATE_MODULES:
        count = geometry.num_layers if module.startswith("decoder.layers.") else 1
        for index in range(count):
            states[f"{module}._extra_state/shard_{index}_{count}"] = None
    return states


def merge_geometry(hf: LlamaGeometry, state: Mapping[str, Any], folder: Path) -> LlamaGeometry:
    """Check a checkpoint's arguments against the configuration; apply what training may change.

    Args:
        hf: The shape that the Hugging Face configuration describes.
        state: The checkpoint's common state.
        folder: Name for errors.
    Raises: ConfigError: they contradict each other, or no Llama has them.
        DataError: the checkpoint has no arguments.
    """
    args = state.get("args")
    if args is None:
        raise DataError(f"{folder} contains no arguments; it was not saved by Megatron's training")
    for name, value in _expected_arguments(hf).items():
        seen = getattr(args, name, value)
        if seen != value:
            raise ConfigError(
                f"{folder}: {name} of the checkpoint is {seen!r}, and {HF_CONFIG_NAME} makes it "
                f"{value!r}: give the configuration that the model was trained from"
            )
    return replace(
        hf,
        rotary_base=float(args.rotary_base),
        rope=rope_from_arguments(args),
        max_position_embeddings=args.max_position_embeddings,
        padded_vocab_size=args.padded_vocab_size,
    )


def find_weights(state: Mapping[str, Any], wanted: str, iteration: Path) -> str:
    """Return the key prefix of the weights that export, evaluation and a new start use.

    A run with FP8 parameters (`--fp8-param-gather`) saves them rounded to eight bits, in BF16; what the
    optimizer works on, and what is used unless the user requests the model's, is its float32 main copy.

    Args:
        state: The checkpoint's common state.
        wanted: One of `WEIGHTS`.
        iteration: Folder of the iteration.
    Raises: ConfigError: an unknown word, or there is no main copy.
    """
    if wanted not in WEIGHTS:
        raise ConfigError(f"--weights {wanted} is unknown; choose one of {', '.join(WEIGHTS)}")
    is_rounded = holds_rounded_weights(state)
    if wanted == "model" or (wanted == "auto" and not is_rounded):
        return ""
    prefix = main_prefix(iteration)
    if prefix is not None:
        return prefix
    reason = "its weights are rounded to FP8, and " if is_rounded else ""
    raise ConfigError(
        f"{iteration}: {reason}the optimizer's main copy in float32 is not in the checkpoint (train with "
        "--bf16 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable and without "
        "--no-save-optim); --weights model uses those that are there"
    )


def holds_rounded_weights(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's model weights are those that FP8 rounded."""
    return bool(getattr(state.get("args"), "fp8_param_gather", False))


def main_prefix(iteration: Path) -> str | None:
    """Return the key prefix of the optimizer's float32 main copy; None if there is none."""
    from megatron_long.checkpoint.torch_dist import stored_keys

    stored = stored_keys(iteration)
    return next((p for p in MAIN_PREFIXES if p + RULES[0].megatron_key in stored), None)


def choose_weights(iteration: Path, wanted: str) -> tuple[str, str]:
    """Return the results of `find_weights` and `describe_weights` for a checkpoint.

    Weights in other programs' formats, which only Megatron reads, are the model's own.

    Raises: ConfigError: see `find_weights`. DataError: the checkpoint is damaged.
    """
    from megatron_long.checkpoint.torch_dist import FORMAT_FILE, read_common_state

    if wanted != "main" and not (iteration / FORMAT_FILE).is_file():
        return "", ""
    state = read_common_state(iteration)
    prefix = find_weights(state, wanted, iteration)
    return prefix, describe_weights(prefix, state)


def describe_weights(prefix: str, state: Mapping[str, Any]) -> str:
    """Describe to the user which weights are used; "" if there is only one kind."""
    if prefix:
        return "the optimizer's float32 main copy of the weights (--weights model takes the model's own)"
    if holds_rounded_weights(state):
        return "the model's weights as FP8 rounded them (--weights main takes the optimizer's copy)"
    return ""


def check_same_rope(trained: LlamaGeometry, other: LlamaGeometry, folder: Path, name: str) -> None:
    """Refuse to export a RoPE or context that training did not use.

    Args:
        trained: The shape by the checkpoint's arguments.
        other: The shape from another source.
        folder: The checkpoint, for the message.
        name: Name of the other source.
    Raises: ConfigError: the two differ.
    """
    for field in ("rotary_base", "rope", "max_position_embeddings"):
        seen, said = getattr(trained, field), getattr(other, field)
        if seen != said:
            raise ConfigError(
                f"{folder} was trained with {field} {seen!r}, and {name} says {said!r}; the export "
                "contains what was trained: omit the flags, or, if a file says so, give --hf-config "
                "with the model's own folder"
            )


def _expected_arguments(geometry: LlamaGeometry) -> dict[str, Any]:
    return {
        **_FIXED_ARGUMENTS,
        "num_layers": geometry.num_layers,
        "hidden_size": geometry.hidden_size,
        "ffn_hidden_size": geometry.ffn_hidden_size,
        "num_attention_heads": geometry.num_attention_heads,
        "kv_channels": geometry.kv_channels,
        "layernorm_epsilon": geometry.norm_epsilon,
        "untie_embeddings_and_output_weights": not geometry.tie_embeddings,
        "add_qkv_bias": geometry.add_qkv_bias,
    }


def check_tensors(reader: TorchDistReader, geometry: LlamaGeometry) -> None:
    """Check names and shapes of a checkpoint's model tensors.

    Raises: DataError: a tensor is missing, has another shape, or is unexpected.
    """
    seen = reader.shapes()
    rules = rules_of(geometry)
    for rule in rules:
        key, expected = rule.megatron_key, checkpoint_shape(rule, geometry)
        if key not in seen:
            raise DataError(f"{reader.folder} holds no tensor {key}, which this Llama needs")
        if seen[key] != expected:
            raise DataError(
                f"{reader.folder}: tensor {key} has shape {list(seen[key])}; "
                f"{HF_CONFIG_NAME} makes it {list(expected)}"
            )
    known = {rule.megatron_key for rule in rules}
    left_over = [key for key in seen if key.startswith(_MODEL_PREFIXES) and key not in known]
    if left_over:
        raise DataError(
            f"{reader.folder} holds tensors that no Llama has: {', '.join(sorted(left_over)[:5])}"
        )
