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


def require_package() -> None:
    """Raises: ConfigError: the package is not installed."""
    if not is_installed():
        raise ConfigError(
            f"{MONITOR_FLAG} needs nvidia-resiliency-ext: pip install 'nvidia-resiliency-ext>=0.6' (Linux "
            "with glibc 2.39, Python up to 3.12), or omit the flag: --hang-timeout works without it"
        )


def check_monitor(args: Namespace) -> None:
    """Refuse flags of nvidia-resiliency-ext that would have no effect.

    Raises: ConfigError: the package or its launcher is missing, or the flag is not supported.
    """
    if args.inprocess_restart:
        raise ConfigError(
            "--inprocess-restart is not supported; restart with --enable-ft-package and "
            "--max-restarts of megatron_long.launch"
        )
    if not args.enable_ft_package:
        return
    require_package()
    if not args.save:
        raise ConfigError(f"{MONITOR_FLAG} keeps its timeouts next to the checkpoints; give --save")


def check_monitor_is_there(args: Namespace) -> None:
    """Refuse to train without a running monitor.

    Raises: ConfigError: this process has none.
    """
    if args.enable_ft_package and MONITOR_SOCKET not in os.environ:
        raise ConfigError(
            f"{MONITOR_FLAG} needs a monitor for each rank: start with python -m megatron_long.launch (or "
            "ft_launcher) instead of torchrun"
        )
