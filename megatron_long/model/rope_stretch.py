"""RoPE for a longer context: bases of recipes, and the effect of `--rope-method` on a model."""

import math
from dataclasses import replace

from megatron_long.errors import ConfigError
from megatron_long.model.geometry import LlamaGeometry
from megatron_long.model.rope import METHODS, BaseRope, LinearRope, Llama3Rope, YarnRope


def ntk_rotary_base(
    base: float, trained_length: int, target_length: int, *, factor: float, head_size: int = 128
) -> int:
    """The base by dynamic NTK: base * (factor * L / L0 - (factor - 1)) ** (d / (d - 2)).

    The longest wavelength grows with the context, while the shortest hardly changes. The authors of the
    recipe evaluate Llama-2 with factor 10 at L = 81,920.

    Args:
        base: RoPE base of the unmodified model.
        trained_length: Tokens it was trained on, L0.
        target_length: Tokens to reach, L.
        factor: Scaling factor of the formula.
        head_size: Channels of a head, d.
    Returns: The base, rounded to an integer, as Megatron's `--rotary-base` takes it.
    Raises: ConfigError: the target is not longer than what was trained.
    Source: dynamic NTK as in transformers' "dynamic" RoPE; evaluation code of arXiv 2402.10171.

    >>> ntk_rotary_base(10_000, 4096, 81_920, factor=10)
    2076062
    """
    if target_length <= trained_length:
        raise ConfigError(
            f"target length {target_length} is not longer than the trained length {trained_length}: "
            "there is nothing to stretch; keep the model's own base"
        )
    growth = factor * target_length / trained_length - (factor - 1)
    return round(base * growth ** (head_size / (head_size - 2)))


def stretch_rope(
    model: LlamaGeometry,
    seq_length: int,
    method: str,
    factor: float | None = None,
    original_length: int | None = None,
) -> LlamaGeometry:
    """Return a model whose RoPE reaches a longer context.

    Its base stays: `base` leaves that to the recipe, the others scale over the model's own. Applied to its
    own result it changes nothing, so that a resumed run keeps the RoPE it began with.

    Args:
        model: The unmodified model.
        seq_length: Tokens to reach.
        method: `base`, `linear`, `yarn` or `llama3`.
        factor: The stretch; None computes it.
        original_length: Tokens that the model was trained on; None takes its configuration's.
    Raises: ConfigError: an unknown method, a value that it does not take, or a stretch that is too small.
    """
    if method not in METHODS:
        raise ConfigError(f"--rope-method {method} is unknown; choose one of {', '.join(METHODS)}")
    if method == "base":
        if factor is not None or original_length is not None:
            raise ConfigError(
                "--rope-method base takes neither --rope-factor nor --rope-original-length; give "
                "--rotary-base, or choose linear, yarn or llama3"
            )
        return replace(model, rope=BaseRope())
    if original_length is not None and original_length < 1:
        raise ConfigError(f"--rope-original-length {original_length} must be 1 or more tokens")
    original = original_length or model.rope.original_length(model.max_position_embeddings)
    stretch = math.ceil(seq_length / original) if factor is None else factor
    if method != "llama3" and stretch * original < seq_length:
        raise ConfigError(
            f"--rope-method {method}: factor {stretch:g} over {original} tokens reaches "
            f"{stretch * original:g}, less than --seq-length {seq_length}; give --rope-factor "
            f"{math.ceil(seq_length / original)} or leave it out"
        )
    rope = _scaled(method, float(stretch), original)
    return replace(model, rope=rope, max_position_embeddings=max(seq_length, original))


def _scaled(method: str, factor: float, original: int) -> BaseRope:
    if method == "linear":
        return LinearRope(factor=factor)
    if method == "yarn":
        return YarnRope(factor=factor, original_max_position_embeddings=original)
    return Llama3Rope(factor=factor, original_max_position_embeddings=original)
