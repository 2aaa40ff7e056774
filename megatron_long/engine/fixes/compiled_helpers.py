"""The data helpers are not compiled at each start.

Upstream: megatron-core 0.19.2, the wheel ships the compiled helpers but no Makefile, and `compile_helpers`
ends the process if `make` fails.
Remove when the wheel ships the Makefile, or `compile_helpers` looks for compiled helpers.
"""

import importlib
from typing import Any

CHANGED_SYMBOLS = {"megatron.core.datasets.utils": ("compile_helpers",)}
"""Symbols replaced, by module."""


def use_compiled_helpers() -> None:
    """Use the helpers of the wheel."""
    helpers: Any = importlib.import_module("megatron.core.datasets.utils")
    helpers.compile_helpers = lambda: None
