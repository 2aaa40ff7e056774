"""RoPE of Llama 3.1 is scaled according to the flags.

Upstream: megatron-core 0.19.2, `RotaryEmbedding._apply_scaling` uses 8, 1, 4 and 8192 regardless of the
flags, and there is a flag only for the first.
Remove when it takes all four from the configuration and has flags for them.
"""

import importlib
from dataclasses import dataclass

from megatron_long.model.rope import BaseRope, Llama3Rope

CHANGED_SYMBOLS = {
    "megatron.core.models.common.embeddings.rotary_pos_embedding": (
        "RotaryEmbedding._apply_scaling",
    ),
}
"""Symbols replaced if RoPE is Llama 3.1's, by module."""


@dataclass(kw_only=True)
class Llama3RopeArguments:
    """Parameters without a Megatron flag, in addition to `--use-rope-scaling` and `--rope-scaling-factor`."""

    rope_scaling_low_freq_factor: float = 1.0
    """low_freq_factor of --use-rope-scaling."""

    rope_scaling_high_freq_factor: float = 4.0
    """high_freq_factor of --use-rope-scaling."""

    rope_scaling_original_length: int = 8192
    """original_max_position_embeddings of --use-rope-scaling."""


def take_llama3_rope(rope: BaseRope) -> None:
    """Make Megatron-Core scale RoPE with these values."""
    assert isinstance(rope, Llama3Rope)
    name = "megatron.core.models.common.embeddings.rotary_pos_embedding"
    embedding = importlib.import_module(name).RotaryEmbedding
    embedding._apply_scaling = lambda self, freqs, factor=None: rope.scale(freqs)
