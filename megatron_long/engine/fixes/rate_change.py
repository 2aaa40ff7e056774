"""Lets a resumed run change its learning rate, its smallest one, or its weight decay.

Upstream: megatron-core 0.19.2 pairs the parameter groups of a checkpoint with those of the optimizer by
values of the schedule, among them `max_lr` and `min_lr`: with another `--lr` none is found (`KeyError` in the
distributed optimizer, `ValueError: Could not find parameter group` in the others) before its own check of the
schedule.
Here the values of the schedule are made equal first; which of them apply, and whether they may differ, is
decided where Megatron does so for a schedule: `OptimizerParamScheduler.load_state_dict`.
Remove when groups are paired by their content.
"""

import functools
import importlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_long.errors import ConfigError

SCHEDULE_KEYS = ("max_lr", "min_lr", "start_wd", "end_wd")
"""Entries of a parameter group that define its schedule; the others define its content."""
OPTIMIZERS = {
    "megatron.core.optimizer.distrib_optimizer": ("DistributedOptimizer",),
    "megatron.core.optimizer.optimizer": ("Float16OptimizerWithFloat16Params", "FP32Optimizer"),
}
"""Classes whose `load_state_dict` is changed, by module."""
CHANGED_SYMBOLS = {
    name: tuple(f"{kind}.load_state_dict" for kind in classes)
    for name, classes in OPTIMIZERS.items()
}
"""Symbols replaced, by module."""

SCHEDULE_FLAGS = {
    "learning rate": "--lr",
    "minimum learning rate": "--min-lr",
    "warmup iterations": "windows of the warmup (--lr-warmup-iters * --global-batch-size)",
    "total number of iterations": "windows in all (--train-iters * --global-batch-size)",
    "learning rate decay style": "--lr-decay-style",
    "start weight decay": "--start-weight-decay",
    "end weight decay": "--weight-decay",
    "total number of weight decay iterations": "windows in all (--train-iters * --global-batch-size)",
    "weight decay incr style": "--weight-decay-incr-style",
}
"""Values that the scheduler checks, and their flags."""
MISMATCH = re.compile(
    r"OptimizerParamScheduler: class input value (.*) and checkpoint ?value (.*) for (.*) do not match"
)

SPENT = re.compile(r"no samples left to consume: (\d+), (\d+)")
"""Megatron's message after a smaller batch, if no steps are left."""


def schedule_error(load: str, message: str) -> ConfigError | None:
    """Return Megatron's refusal of another schedule in terms of flags; None for another error.

    >>> text = "OptimizerParamScheduler: class input value 8 and checkpointvalue 4 for learning rate"
    >>> str(schedule_error("out", text + " do not match"))[:71]
    '--load out was trained on another schedule: --lr was 4, and now it is 8'
    >>> str(schedule_error("out", "no samples left to consume: 16, 12"))[:43]
    '--load out has read 16 windows already, and'
    """
    if spent := SPENT.fullmatch(message):
        return ConfigError(
            f"--load {load} has read {spent[1]} windows already, and --train-iters * --global-batch-size "
            f"requests {spent[2]} in total: nothing would be left to train; raise --train-iters"
        )
    found = MISMATCH.fullmatch(message)
    if found is None:
        return None
    now, before, name = found.groups()
    return ConfigError(
        f"--load {load} was trained on another schedule: {SCHEDULE_FLAGS.get(name, name)} was {before}, and "
        f"now it is {now}; give --override-opt-param-scheduler to continue with the new value, or "
        "--use-checkpoint-opt-param-scheduler for the old one"
    )


def let_rates_change(*, keep_saved: bool) -> None:
    """Pair groups regardless of their learning rate.

    Args:
        keep_saved: Whether to use the checkpoint's schedule (`--use-checkpoint-opt-param-scheduler`), else
            that of the flags.
    """
    for name, classes in OPTIMIZERS.items():
        module: Any = importlib.import_module(name)
        for kind in classes:
            _let_change(getattr(module, kind), keep_saved)


def _let_change(kind: Any, keep_saved: bool) -> None:
    stock = kind.load_state_dict

    @functools.wraps(stock)
    def load_state_dict(self, state_dict):
        if self.optimizer is not None:  # a rank without parameters has none
            align_groups(
                self.optimizer.param_groups, saved_groups(state_dict), keep_saved=keep_saved
            )
        return stock(self, state_dict)

    kind.load_state_dict = load_state_dict


def saved_groups(state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameter groups in the state of one of `OPTIMIZERS`."""
    inner = state_dict.get("optimizer", state_dict)
    groups: list[dict[str, Any]] = inner.get("param_groups", [])
    return groups


def align_groups(
    current: Iterable[dict[str, Any]], saved: Iterable[dict[str, Any]], *, keep_saved: bool
) -> None:
    """Set the same values of `SCHEDULE_KEYS` in paired groups, in place.

    Groups that differ in nothing else stay unchanged.

    Args:
        keep_saved: Whether to use those of `saved`.

    >>> now = [{"wd_mult": 1.0, "max_lr": 1e-5}, {"wd_mult": 0.0, "max_lr": 1e-5}]
    >>> before = [{"wd_mult": 0.0, "max_lr": 2e-5}, {"wd_mult": 1.0, "max_lr": 2e-5}]
    >>> align_groups(now, before, keep_saved=False)
    >>> [group["max_lr"] for group in before]
    [1e-05, 1e-05]
    """
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for group in saved:
        found.setdefault(_lasting_key(group), []).append(group)
    for group in current:
        partners = found.get(_lasting_key(group), [])
        if len(partners) != 1:
            continue
        source, target = (partners[0], group) if keep_saved else (group, partners[0])
        for key in SCHEDULE_KEYS:
            target.pop(key, None)
        target.update({key: source[key] for key in SCHEDULE_KEYS if key in source})


def _lasting_key(group: Mapping[str, Any]) -> tuple[Any, ...]:
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    names = [name for name in param_group_identifier_keys if name not in SCHEDULE_KEYS]
    return tuple(group.get(name, group.get(f"pre_{name}")) for name in names)
