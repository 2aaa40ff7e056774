"""Megatron takes our flags where it would parse `sys.argv` again, without ours and without recipes.

Upstream: megatron-core 0.19.2, `ft_integration.setup` calls `parse_args`, and ends at a length such as 64K.
Can go when it calls `get_args` instead.
"""

import contextlib
import importlib
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

CHANGED_SYMBOLS = {"megatron.training.arguments": ("parse_args",)}
"""What is replaced while it trains, by module."""


@contextlib.contextmanager
def flags_parsed_once(args: Namespace) -> Iterator[None]:
    """Give these flags to whoever parses."""
    module: Any = importlib.import_module("megatron.training.arguments")
    stock = module.parse_args
    module.parse_args = lambda *_args, **_kwargs: args
    try:
        yield
    finally:
        module.parse_args = stock
