"""The data helpers are not compiled at each start.

Upstream: megatron-core 0.19.2, the wheel ships the compiled helpers but no Makefile, and `compile_helpers`
ends the process where `make` fails.
Can go when the wheel ships the Makefile, or `compile_helpers` looks for what is compiled already.
"""

import importlib
from typing import Any

CHANGED_SYMBOLS = {"megatron.core.datasets.utils": ("compile_helpers",)}
"""What is replaced, by module."""


def use_compiled_helpers() -> None:
    """Take those of the wheel."""
    helpers: Any = importlib.import_module("megatron.core.datasets.utils")
    helpers.compile_helpers = lambda: None
