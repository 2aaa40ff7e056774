"""An output layer that is never called may be built with in-place weight gradients.

Upstream: megatron-core 0.19.2, the constructor of `ColumnParallelLinear` refuses them without Apex's kernel,
which only its forward pass would run.
Remove when the kernel is required only where it runs.
"""

import importlib
from typing import Any

CHANGED_SYMBOLS = {"megatron.core.tensor_parallel.layers": ("_grad_accum_fusion_available",)}
"""Symbols replaced if the output layer is not called, by module."""


def let_output_layer_be_built() -> None:
    """Report that the kernel is available."""
    layers: Any = importlib.import_module("megatron.core.tensor_parallel.layers")
    layers._grad_accum_fusion_available = True
