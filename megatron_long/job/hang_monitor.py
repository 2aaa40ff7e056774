"""nvidia-resiliency-ext's monitor, which ends ranks that the kernel has stopped: `--enable-ft-package`."""

import importlib.util
import os
from argparse import Namespace

from megatron_long.errors import ConfigError

MONITOR_FLAG = "--enable-ft-package"
MONITOR_PACKAGE = "nvidia_resiliency_ext"
MONITOR_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"
"""Environment variable that tells a rank the address of its monitor."""


def is_installed() -> bool:
    return importlib.util.find_spec(MONITOR_PACKAGE) is not None


def check_monitor_is_there(args: Namespace) -> None:
    """Refuse to train without a running monitor.

    Raises: ConfigError: this process has none.
    """
    if args.enable_ft_package and MONITOR_SOCKET not in os.environ:
        raise ConfigError(
            f"{MONITOR_FLAG} needs a monitor for each rank: start with python -m megatron_long.launch (or "
            "ft_launcher) instead of torchrun"
        )
