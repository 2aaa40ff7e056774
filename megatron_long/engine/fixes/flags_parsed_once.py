"""Megatron uses our parsed flags instead of parsing `sys.argv` again, without our flags and recipes.

Upstream: megatron-core 0.19.2, `ft_integration.setup` calls `parse_args`, and ends at a length such as 64K.
Remove when it calls `get_args` instead.
"""

import contextlib
import importlib
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

CHANGED_SYMBOLS = {"megatron.training.arguments": ("parse_args",)}
"""Symbols replaced during training, by module."""


@contextlib.contextmanager
def flags_parsed_once(args: Namespace) -> Iterator[None]:
    """Return these flags to every caller that parses."""
    module: Any = importlib.import_module("megatron.training.arguments")
    stock = module.parse_args
    module.parse_args = lambda *_args, **_kwargs: args
    try:
        yield
    finally:
        module.parse_args = stock
