"""The state that training changes on this rank, and whether it is finite."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element is NaN or infinite; quantized tensors are skipped.

    The tensors may be on several devices, as with `--optimizer-cpu-offload`; each device is waited for once.
    """
    checks: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        is_plain = type(tensor.data) is Tensor and tensor.is_floating_point()
        if is_plain and tensor.numel() and tensor.element_size() > 1:
            checks.setdefault(tensor.device, []).append(torch.isfinite(tensor).all())
    return all(bool(torch.stack(found).all().item()) for found in checks.values())


def state_tensors(model: Iterable[torch.nn.Module], optimizer: Any) -> Iterable[Tensor]:
    """Weights, main weights and optimizer state of this process."""
    for chunk in model:
        yield from chunk.parameters()
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is None:
            continue
        for group in inner.param_groups:
            yield from group["params"]
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
