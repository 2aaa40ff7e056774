"""RoPE of Llama 3.1 is scaled as the flags say.

Upstream: megatron-core 0.19.2, `RotaryEmbedding._apply_scaling` takes 8, 1, 4 and 8192 whatever they are, and
there are flags for the first of them alone.
Can go when it takes all four from the configuration, and flags give them.
"""

import importlib
from dataclasses import dataclass

from megatron_long.model.rope import BaseRope, Llama3Rope

CHANGED_SYMBOLS = {
    "megatron.core.models.common.embeddings.rotary_pos_embedding": (
        "RotaryEmbedding._apply_scaling",
    ),
}
"""What is replaced where RoPE is Llama 3.1's, by module."""


@dataclass(kw_only=True)
class Llama3RopeArguments:
    """What Megatron has no flags for besides `--use-rope-scaling` and `--rope-scaling-factor`."""

    rope_scaling_low_freq_factor: float = 1.0
    """low_freq_factor of --use-rope-scaling."""

    rope_scaling_high_freq_factor: float = 4.0
    """high_freq_factor of --use-rope-scaling."""

    rope_scaling_original_length: int = 8192
    """original_max_position_embeddings of --use-rope-scaling."""


def take_llama3_rope(rope: BaseRope) -> None:
    """Let Megatron-Core scale RoPE so."""
    assert isinstance(rope, Llama3Rope)
    name = "megatron.core.models.common.embeddings.rotary_pos_embedding"
    embedding = importlib.import_module(name).RotaryEmbedding
    embedding._apply_scaling = lambda self, freqs, factor=None: rope.scale(freqs)
