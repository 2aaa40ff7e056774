"""Each line of Megatron's log covers the steps since the previous line.

Upstream: megatron-core 0.19.2, `training_log` logs the first step of a start and also counts it in the next
mean; with `--log-interval 1` the second loss would be that of two steps.
Remove when `training_log` resets its sums after the first line as after the others.
"""

import functools
import importlib
import inspect
from typing import Any

CHANGED_SYMBOLS = {"megatron.training.training": ("training_log",)}
"""Symbols replaced, by module."""


def log_each_step_once() -> None:
    """If the first step ends an interval, log it as the end of one."""
    from megatron.training.global_vars import get_args

    training: Any = importlib.import_module("megatron.training.training")
    stock, signature = training.training_log, inspect.signature(training.training_log)

    @functools.wraps(stock)
    def training_log(*positional, **named):
        values = signature.bind(*positional, **named)
        if values.arguments["iteration"] % get_args().log_interval == 0:
            values.arguments["is_first_iteration"] = False
        return stock(*values.args, **values.kwargs)

    training.training_log = training_log
