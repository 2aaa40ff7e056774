"""RoPE bases for a stretch."""

from megatron_long.errors import ConfigError


def ntk_rotary_base(
    base: float, trained_length: int, target_length: int, *, factor: float, head_size: int = 128
) -> int:
    """The base by dynamic NTK: base * (factor * L / L0 - (factor - 1)) ** (d / (d - 2)).

    The longest wavelength grows with the context, while the shortest hardly moves. The authors of the
    recipe evaluate Llama-2 with factor 10 at L = 81,920.

    Args:
        base: RoPE base of the model as it is.
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
