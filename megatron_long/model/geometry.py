"""Shape of a Llama-like model: read from a Hugging Face `config.json`, given to Megatron as flags.

`families` has the differences between families. Needs neither torch nor Megatron.
"""

import json
import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_long.errors import ConfigError
from megatron_long.model.families import (
    family_of_flags,
    family_of_type,
    find_family,
    refuse_unsupported,
)
from megatron_long.model.rope import PLAIN_ROPE, BaseRope, rope_from_arguments
from megatron_long.model.rope_hf import check_number, read_rope

CONFIG_NAME = "config.json"
HF_CONFIG_NAME = "hf_config.json"
"""The same, in a folder of Megatron checkpoints."""
VOCABULARY_MULTIPLE = 128
"""Megatron's default padding, taken without tensor parallelism: one shape for every layout."""

_POSITIVE_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "padded_vocab_size",
    "norm_epsilon",
    "rotary_base",
    "max_position_embeddings",
)


@dataclass(frozen=True, kw_only=True)
class LlamaGeometry:
    """The parameters of a Llama that determine the shapes and the arithmetic of its forward pass."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Heads of keys and values; equal to `num_attention_heads` without grouped-query attention."""
    kv_channels: int
    """Size of one attention head."""
    vocab_size: int
    """Rows of the Hugging Face embedding."""
    padded_vocab_size: int
    """Rows of the Megatron embedding."""
    norm_epsilon: float
    rotary_base: float
    max_position_embeddings: int
    """Longest context, in tokens."""
    tie_embeddings: bool
    """Whether the output layer is the embedding."""
    rope: BaseRope = PLAIN_ROPE
    """How RoPE is scaled, in addition to its base."""
    model_type: str = "llama"
    """Hugging Face's name of the family, see `families`."""
    init_method_std: float = 0.02
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in _POSITIVE_FIELDS:
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be more than 0")
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"{self.num_attention_heads} attention heads cannot be shared by "
                f"{self.num_query_groups} key/value heads: a multiple of these is needed"
            )
        if self.kv_channels % 2:
            raise ConfigError(
                f"head size {self.kv_channels} is odd; RoPE rotates pairs, so it must be even"
            )
        if self.padded_vocab_size < self.vocab_size:
            raise ConfigError(
                f"padded_vocab_size {self.padded_vocab_size} is below vocab_size {self.vocab_size}"
            )

    @property
    def add_qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have a bias."""
        return family_of_type(self.model_type).add_qkv_bias

    def to_argv(self) -> list[str]:
        """Return the Megatron flags of this shape.

        Dropout is among them because Megatron's default of 0.1 is not Llama's.

        Raises: ConfigError: `rotary_base` is not a whole number, which `--rotary-base` requires.
        """
        if self.rotary_base != int(self.rotary_base):
            raise ConfigError(
                f"RoPE base {self.rotary_base} is not a whole number, and Megatron's --rotary-base "
                "takes whole numbers only; round rope_theta in the model's config.json"
            )
        values: dict[str, object] = {
            "--num-layers": self.num_layers,
            "--hidden-size": self.hidden_size,
            "--ffn-hidden-size": self.ffn_hidden_size,
            "--num-attention-heads": self.num_attention_heads,
            "--num-query-groups": self.num_query_groups,
            "--kv-channels": self.kv_channels,
            "--padded-vocab-size": self.padded_vocab_size,
            "--max-position-embeddings": self.max_position_embeddings,
            "--rotary-base": int(self.rotary_base),
            "--normalization": "RMSNorm",
            "--norm-epsilon": self.norm_epsilon,
            "--init-method-std": self.init_method_std,
            "--attention-dropout": self.attention_dropout,
            "--hidden-dropout": 0.0,
        }
        argv = [word for flag, value in values.items() for word in (flag, str(value))]
        argv += self.rope.to_argv()
        argv += ["--group-query-attention", "--swiglu", "--disable-bias-linear"]
        if not self.tie_embeddings:
            argv.append("--untie-embeddings-and-output-weights")
        if self.add_qkv_bias:
            argv.append("--add-qkv-bias")
        return argv

    def to_hf_config(self) -> dict[str, Any]:
        """Return the Hugging Face configuration of this shape, with the keys of transformers 4 and 5."""
        family = family_of_type(self.model_type)
        return {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_query_groups,
            "head_dim": self.kv_channels,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": self.norm_epsilon,
            **self.to_hf_rope(),
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.init_method_std,
            "attention_dropout": self.attention_dropout,
        }

    def to_hf_rope(self) -> dict[str, Any]:
        """Return the entries of `to_hf_config` that a stretch changes.

        Attention here covers every token, so the result has no sliding window.
        """
        scaling = self.rope.to_hf()
        everywhere = ["full_attention"] * self.num_layers
        windows: dict[str, dict[str, Any]] = {
            "mistral": {"sliding_window": None},
            "qwen2": {
                "sliding_window": None,
                "use_sliding_window": False,
                "layer_types": everywhere,
            },
        }
        return {
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rotary_base,
            "rope_scaling": None if type(self.rope) is BaseRope else scaling,
            "rope_parameters": {**scaling, "rope_theta": self.rotary_base},
            **windows.get(self.model_type, {}),
        }


def geometry_from_args(
    args: Namespace, vocab_size: int | None = None, model_type: str | None = None
) -> LlamaGeometry:
    """Read the shape from Megatron's parsed flags, the opposite of `LlamaGeometry.to_argv`.

    Args:
        args: Megatron's flags.
        vocab_size: Real tokens of the vocabulary; None counts the padded rows as real.
        model_type: The family, which flags do not tell; None takes the first that fits them.
    """
    heads = args.num_attention_heads
    has_rope = args.position_embedding_type in ("rope", "yarn")
    return LlamaGeometry(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else heads,
        kv_channels=args.kv_channels or args.hidden_size // heads,
        vocab_size=vocab_size or args.padded_vocab_size,
        padded_vocab_size=args.padded_vocab_size,
        norm_epsilon=args.layernorm_epsilon,
        rotary_base=float(args.rotary_base),
        max_position_embeddings=args.max_position_embeddings,
        tie_embeddings=not args.untie_embeddings_and_output_weights,
        model_type=model_type or family_of_flags(add_qkv_bias=args.add_qkv_bias).model_type,
        rope=rope_from_arguments(args) if has_rope else PLAIN_ROPE,
        init_method_std=args.init_method_std,
        attention_dropout=args.attention_dropout,
    )


def pad_vocab_size(vocab_size: int) -> int:
    """Round a vocabulary up to the number of embedding rows that Megatron holds.

    >>> pad_vocab_size(32000), pad_vocab_size(32001)
    (32000, 32128)
    """
    return math.ceil(vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def geometry_from_hf(model_dir: Path) -> LlamaGeometry:
    """Read the shape of a Hugging Face Llama.

    Args:
        model_dir: Folder with `config.json`, or the path of such a file.
    Raises: ConfigError: the file is missing or broken, or the model is not a Llama that Megatron's
        `GPTModel` computes exactly.
    """
    path = model_dir if model_dir.is_file() else model_dir / CONFIG_NAME
    return geometry_from_config(read_hf_config(path), name=str(path))


def read_hf_config(path: Path) -> dict[str, Any]:
    """Read a Hugging Face `config.json`.

    Raises: ConfigError: it is missing or holds no JSON object.
    """
    if not path.is_file():
        own = path.with_name(HF_CONFIG_NAME)
        remedy = f"give a Hugging Face model folder ({CONFIG_NAME})"
        if own.is_file():
            remedy = (
                f"{path.parent} holds Megatron checkpoints: {own} describes their model, and "
                "tools/convert_checkpoint.py megatron-to-hf makes a Hugging Face folder of them"
            )
        raise ConfigError(f"{path} does not exist; {remedy}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = f"{path} is not JSON: {error}; "
        remedy = (
            "download it again" if path.suffix == ".json" else "give the folder that contains it"
        )
        raise ConfigError(reason + remedy) from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}; it must be a JSON object")
    return config


def geometry_from_config(config: Mapping[str, Any], *, name: str = CONFIG_NAME) -> LlamaGeometry:
    """Return the shape that a parsed Hugging Face configuration describes.

    Args:
        config: Content of `config.json`, with the keys of transformers 4 or 5.
        name: What to call the file in errors.
    Raises: ConfigError: see `geometry_from_hf`.
    Source: `transformers` 5.23, `LlamaConfig`, `MistralConfig`, `Qwen2Config`.
    """
    family = find_family(config, name)
    config = {**family.defaults, **config}
    refuse_unsupported(config, family, name)
    max_position_embeddings = _whole(config, "max_position_embeddings", name, default=2048)
    rotary_base, rope = read_rope(config, max_position_embeddings, name)
    hidden_size = _whole(config, "hidden_size", name)
    num_heads = _whole(config, "num_attention_heads", name)
    vocab_size = _whole(config, "vocab_size", name)
    return LlamaGeometry(
        num_layers=_whole(config, "num_hidden_layers", name),
        hidden_size=hidden_size,
        ffn_hidden_size=_whole(config, "intermediate_size", name),
        num_attention_heads=num_heads,
        num_query_groups=_whole(config, "num_key_value_heads", name, default=num_heads),
        kv_channels=_whole(config, "head_dim", name, default=hidden_size // max(1, num_heads)),
        vocab_size=vocab_size,
        padded_vocab_size=pad_vocab_size(vocab_size),
        norm_epsilon=_number(config, "rms_norm_eps", name, default=1e-6),
        rotary_base=rotary_base,
        max_position_embeddings=max_position_embeddings,
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        model_type=family.model_type,
        rope=rope,
        init_method_std=_number(config, "initializer_range", name, default=0.02),
        attention_dropout=_number(config, "attention_dropout", name, default=0.0),
    )


def _number(config: Mapping[str, Any], key: str, name: str, *, default: float) -> float:
    value = config.get(key)
    return default if value is None else float(check_number(value, key, name))


def _whole(config: Mapping[str, Any], key: str, name: str, *, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(
            f"{name}: {key} is {'missing' if value is None else repr(value)}; "
            "it must be a whole number"
        )
    return value
