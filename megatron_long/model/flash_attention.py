"""FlashAttention 3 and 4 under Transformer Engine: which is there, and one fix.

Transformer Engine passes a window of (-1, 0) for "causal, unlimited". From flash-attn-4 4.0.0b36 (and in
b24 not yet) a left bound of -1 with a right bound of 0 is treated as a bound: nothing is attended,
silently and fast. `fix_windows` makes a negative bound mean "unlimited" again.
"""

import functools
import importlib
import importlib.metadata
from typing import Any

from megatron_long.errors import ConfigError

DISTRIBUTIONS = ("flash-attn-3", "flash-attn-4")
"""FlashAttention 3 (built from source) and 4 (on PyPI), as Transformer Engine 2.20 looks for them."""
WINDOW_FUNCTION = "_resolve_causal_local_window"


def installed_versions() -> dict[str, str]:
    """Distribution -> version of the FlashAttention releases that are installed."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def fix_windows() -> None:
    """Make flash-attn-4 read a negative window bound as unlimited; does nothing without flash-attn-4.

    Raises: ConfigError: a release of flash-attn-4 without the function that is fixed.
    """
    version = installed_versions().get("flash-attn-4")
    if version is None:
        return
    interface: Any = importlib.import_module("flash_attn.cute.interface")
    stock = getattr(interface, WINDOW_FUNCTION, None)
    if stock is None:
        raise ConfigError(
            f"flash-attn-4 {version} is installed, and this release knows it up to 4.0.0b36: attention "
            "under context parallelism could silently be wrong; pip install flash-attn-4==4.0.0b36, or "
            "uninstall it"
        )
    if getattr(stock, "reads_negative_as_unlimited", False):
        return

    @functools.wraps(stock)
    def resolve(causal: bool, left: int | None, right: int | None, mask_mod: Any = None) -> tuple:
        return stock(causal, unlimited(left), unlimited(right), mask_mod)

    resolve.reads_negative_as_unlimited = True  # type: ignore[attr-defined]
    setattr(interface, WINDOW_FUNCTION, resolve)


def unlimited(bound: int | None) -> int | None:
    """A window bound as flash-attn-4 writes it.

    >>> unlimited(-1), unlimited(0), unlimited(None)
    (None, 0, None)
    """
    return None if bound is not None and bound < 0 else bound
