"""An output layer that is never called may be built with in-place weight gradients.

Upstream: megatron-core 0.19.2, the constructor of `ColumnParallelLinear` refuses them without Apex's kernel,
which only its forward pass would run.
Can go when the kernel is asked for where it runs.
"""

import importlib
from typing import Any

CHANGED_SYMBOLS = {"megatron.core.tensor_parallel.layers": ("_grad_accum_fusion_available",)}
"""What is replaced where the output layer is not called, by module."""


def let_output_layer_be_built() -> None:
    """Say that the kernel is there."""
    layers: Any = importlib.import_module("megatron.core.tensor_parallel.layers")
    layers._grad_accum_fusion_available = True
