"""RoPE methods: each computes its frequencies and gives Megatron's flags and Hugging Face's keys.

A method is a frozen dataclass next to the base, which is the model's: `LlamaGeometry.rotary_base`. Its
frequencies are those of `transformers` for the configuration it exports (same formula, same float32
operations), and those that Megatron-Core computes from the flags it emits. Imports torch only to compute.
"""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_long.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BaseRope:
    """RoPE with a base and no scaling. The other methods derive from it."""

    method: ClassVar[str] = "base"
    """Name for `--rope-method`."""
    hf_type: ClassVar[str] = "default"
    """Name for `rope_type` in a Hugging Face configuration."""

    def inverse_frequencies(self, base: float, head_size: int) -> Tensor:
        """Angle of each pair of channels for a step of one token [d/2], float32, radians."""
        import torch

        exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
        return 1.0 / (base**exponents)

    @property
    def attention_scaling(self) -> float:
        """Factor of cosines and sines."""
        return 1.0

    def original_length(self, max_position_embeddings: int) -> int:
        """Context length that the model was trained with before it was stretched."""
        return max_position_embeddings

    def to_arguments(self) -> dict[str, Any]:
        """Return Megatron's arguments that differ from its defaults for plain RoPE."""
        return {}

    def to_argv(self) -> list[str]:
        """Return the flags of `to_arguments`."""
        words: list[str] = []
        for name, value in (PLAIN_ROPE_ARGUMENTS | self.to_arguments()).items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool) or value is None:
                words += [flag] if value else []
            else:
                words += [flag, str(value)]
        return words

    def to_hf(self) -> dict[str, Any]:
        """Return the entries of Hugging Face's `rope_parameters`, without the base."""
        return {"rope_type": self.hf_type}

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_allowed = value >= 0 if field.name == "mscale" else value > 0
            if not (isinstance(value, bool) or (is_allowed and value < math.inf)):
                raise ConfigError(
                    f"RoPE {self.method}: {field.name} is {value}; it must be above 0 and finite"
                )
        factor = getattr(self, "factor", 1.0)
        if factor < 1.0:
            raise ConfigError(
                f"RoPE {self.method}: factor is {factor}; it must be 1 or more, as the context is "
                "stretched by it"
            )


@dataclass(frozen=True, kw_only=True)
class LinearRope(BaseRope):
    """Position interpolation (arXiv 2306.15595): every angle divided by the factor."""

    method: ClassVar[str] = "linear"
    hf_type: ClassVar[str] = "linear"
    factor: float

    def inverse_frequencies(self, base: float, head_size: int) -> Tensor:
        return super().inverse_frequencies(base, head_size) / self.factor

    def original_length(self, max_position_embeddings: int) -> int:
        return round(max_position_embeddings / self.factor)

    def to_arguments(self) -> dict[str, Any]:
        if self.factor != int(self.factor):
            raise ConfigError(
                f"RoPE linear: factor {self.factor} is not a whole number, and Megatron's "
                "--rotary-seq-len-interpolation-factor takes whole numbers only; round it up"
            )
        return {"rotary_seq_len_interpolation_factor": int(self.factor)}

    def to_hf(self) -> dict[str, Any]:
        return {**super().to_hf(), "factor": self.factor}


@dataclass(frozen=True, kw_only=True)
class Llama3Rope(BaseRope):
    """Llama-3.1's scaling: long wavelengths divided by the factor, short ones kept, a ramp between."""

    method: ClassVar[str] = "llama3"
    hf_type: ClassVar[str] = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"RoPE llama3: high_freq_factor {self.high_freq_factor} must be above low_freq_factor "
                f"{self.low_freq_factor}: the ramp is between them"
            )

    def inverse_frequencies(self, base: float, head_size: int) -> Tensor:
        return self.scale(super().inverse_frequencies(base, head_size))

    def scale(self, frequencies: Tensor) -> Tensor:
        """Turn the frequencies of plain RoPE into these."""
        import torch

        low, high = self.low_freq_factor, self.high_freq_factor
        original = self.original_max_position_embeddings
        wavelengths = 2 * math.pi / frequencies
        scaled = torch.where(wavelengths > original / low, frequencies / self.factor, frequencies)
        share = (original / wavelengths - low) / (high - low)
        between = (1 - share) * scaled / self.factor + share * scaled
        is_between = (wavelengths >= original / high) & (wavelengths <= original / low)
        return torch.where(is_between, between, scaled)

    def original_length(self, max_position_embeddings: int) -> int:
        return self.original_max_position_embeddings

    def to_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"use_rope_scaling": True, "rope_scaling_factor": self.factor}
        for name, field in LLAMA3_ARGUMENTS.items():
            if getattr(self, field) != getattr(Llama3Rope(), field):
                arguments[name] = getattr(self, field)
        return arguments

    def to_hf(self) -> dict[str, Any]:
        return {**super().to_hf(), **{f.name: getattr(self, f.name) for f in fields(self)}}


@dataclass(frozen=True, kw_only=True)
class YarnRope(BaseRope):
    """YaRN (arXiv 2309.00071): interpolation by wavelength, and sharper attention."""

    method: ClassVar[str] = "yarn"
    hf_type: ClassVar[str] = "yarn"
    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    """What `attention_scaling` is computed from: 1 + mscale * 0.1 * ln(factor)."""
    truncate: bool = True
    """Whether the bounds of the ramp are rounded to whole channels."""

    @property
    def attention_scaling(self) -> float:
        return 0.1 * self.mscale * math.log(self.factor) + 1.0

    def inverse_frequencies(self, base: float, head_size: int) -> Tensor:
        import torch

        plain = base ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
        low, high = (self._channel(turns, base, head_size) for turns in self._turns)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_size - 1)
        width = high - low if high != low else 0.001
        channels = torch.arange(head_size // 2, dtype=torch.float32)
        kept = 1 - torch.clamp((channels - low) / width, 0, 1)
        return 1.0 / (self.factor * plain) * (1 - kept) + 1.0 / plain * kept

    @property
    def _turns(self) -> tuple[float, float]:
        return self.beta_fast, self.beta_slow

    def _channel(self, turns: float, base: float, head_size: int) -> float:
        """The pair of channels that makes this many rotations within the original length."""
        original = self.original_max_position_embeddings
        return head_size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    def original_length(self, max_position_embeddings: int) -> int:
        return self.original_max_position_embeddings

    def to_arguments(self) -> dict[str, Any]:
        return {
            "position_embedding_type": "yarn",
            "rotary_scaling_factor": self.factor,
            "yarn_original_max_position_embeddings": self.original_max_position_embeddings,
            "yarn_beta_fast": self.beta_fast,
            "yarn_beta_slow": self.beta_slow,
            "yarn_correction_range_round_to_int": self.truncate,
            "mscale": self.mscale,
            "mscale_all_dim": 0.0,
        }

    def to_argv(self) -> list[str]:
        return [
            *super().to_argv(),
            *([] if self.truncate else ["--no-yarn-correction-range-round-to-int"]),
        ]

    def to_hf(self) -> dict[str, Any]:
        return {
            **super().to_hf(),
            "factor": self.factor,
            "original_max_position_embeddings": self.original_max_position_embeddings,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "truncate": self.truncate,
            "attention_factor": self.attention_scaling,
        }


PLAIN_ROPE = BaseRope()
METHODS: dict[str, type[BaseRope]] = {
    kind.method: kind for kind in (BaseRope, LinearRope, YarnRope, Llama3Rope)
}
PLAIN_ROPE_ARGUMENTS: dict[str, Any] = {
    "position_embedding_type": "rope",
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
}
"""Megatron's arguments for RoPE without scaling; a method's `to_arguments` override them."""
LLAMA3_ARGUMENTS = {
    "rope_scaling_low_freq_factor": "low_freq_factor",
    "rope_scaling_high_freq_factor": "high_freq_factor",
    "rope_scaling_original_length": "original_max_position_embeddings",
}
"""Our arguments in addition to Megatron's `--rope-scaling-factor`, by field; Megatron-Core has
these three fixed at the defaults of `Llama3Rope` (see `engine.megatron_adapter`)."""


def rope_from_arguments(args: Namespace) -> BaseRope:
    """Read the method from Megatron's arguments, the opposite of `to_arguments`.

    Raises: ConfigError: no Hugging Face Llama has them.
    """
    if args.position_embedding_type not in ("rope", "yarn"):
        raise ConfigError(
            f"--position-embedding-type {args.position_embedding_type}: a Llama has rope, or yarn"
        )
    rules = {"rotary_percent": 1.0, "rotary_interleaved": False}
    for name, allowed in rules.items():
        if getattr(args, name, allowed) != allowed:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} {getattr(args, name)}: a Llama has {allowed}; drop the flag")
    interpolation = getattr(args, "rotary_seq_len_interpolation_factor", None)
    given = {
        "--position-embedding-type yarn": args.position_embedding_type == "yarn",
        "--use-rope-scaling": args.use_rope_scaling,
        "--rotary-seq-len-interpolation-factor": interpolation is not None,
    }
    chosen = [flag for flag, is_given in given.items() if is_given]
    if len(chosen) > 1:
        raise ConfigError(
            f"{' and '.join(chosen)} are two RoPE methods, and a model has one; give one of "
            f"--rope-method {'|'.join(METHODS)}"
        )
    if args.position_embedding_type == "yarn":
        return _yarn_from_arguments(args)
    if args.use_rope_scaling:
        values = {
            field: getattr(args, name)
            for name, field in LLAMA3_ARGUMENTS.items()
            if getattr(args, name, None) is not None
        }
        return Llama3Rope(factor=getattr(args, "rope_scaling_factor", 8.0), **values)
    return PLAIN_ROPE if interpolation is None else LinearRope(factor=float(interpolation))


def _yarn_from_arguments(args: Namespace) -> YarnRope:
    values = {
        "beta_fast": args.yarn_beta_fast,
        "beta_slow": args.yarn_beta_slow,
        "truncate": args.yarn_correction_range_round_to_int,
    }
    factor = args.rotary_scaling_factor
    return YarnRope(
        factor=factor,
        original_max_position_embeddings=args.yarn_original_max_position_embeddings or 4096,
        mscale=find_mscale(factor, attention_scaling(factor, args.mscale, args.mscale_all_dim)),
        **{name: value for name, value in values.items() if value is not None},
    )


def attention_scaling(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """YaRN's, as Megatron-Core and transformers compute it from two weights."""
    over, under = (
        0.1 * weight * math.log(max(factor, 1.0)) + 1.0 for weight in (mscale, mscale_all_dim)
    )
    return over / under


def find_mscale(factor: float, scaling: float) -> float:
    """The single weight that is equivalent to an attention scaling.

    Raises: ConfigError: none does.
    """
    stretch = 0.1 * math.log(max(factor, 1.0))
    mscale = (scaling - 1.0) / stretch if stretch else 1.0
    if mscale < 0 or (stretch == 0 and scaling != 1.0):
        raise ConfigError(
            f"YaRN with an attention scaling of {scaling} at factor {factor}: Megatron computes only "
            "1 and above, and 1 without a stretch; drop attention_factor"
        )
    return float(f"{mscale:.12g}")  # 1.0 and the like again, whatever was rounded on the way
