"""Estimates for the whole corpus from counts of a sample."""

import dataclasses
from typing import Any

from megatron_long.dataset.manifest import SourceInfo

PREFIXES = ("documents_", "tokens_", "bytes_")


def scale_source(info: SourceInfo, fraction: float) -> SourceInfo:
    """Divide every count by the share of the corpus that was read; shares stay.

    Args:
        fraction: From 0 to 1.
    """

    def scale(value: int) -> int:
        return round(value / fraction)

    changes: dict[str, Any] = {"tokens_in_is_exact": False}
    for field in dataclasses.fields(info):
        value = getattr(info, field.name)
        if field.name.startswith(PREFIXES) and not isinstance(value, bool):
            changes[field.name] = (
                [scale(v) for v in value] if isinstance(value, list) else scale(value)
            )
    return dataclasses.replace(info, **changes)
