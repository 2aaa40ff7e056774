"""Ranges of the numbers among Megatron's flags, checked before anything is built.

Outside of them torch or numpy end in a traceback after the start, or the flag silently does nothing:
`--clip-grad nan` clips nothing, and `--save-minutes nan` never saves.
"""

import math
import sys
from argparse import Namespace

from megatron_long.errors import ConfigError

LARGEST_SEED = 4_000_000_000
"""numpy takes 32 bits, and Megatron adds numbers of ranks."""

AT_LEAST_0 = (
    "lr",
    "min_lr",
    "lr_warmup_init",
    "lr_warmup_iters",
    "lr_warmup_samples",
    "lr_warmup_fraction",
    "weight_decay",
    "start_weight_decay",
    "end_weight_decay",
    "clip_grad",
    "init_method_std",
    "embedding_init_method_std",
    "num_workers",
    "eval_iters",
    "exit_duration_in_mins",
)
ABOVE_0 = ("adam_eps", "loss_scale")
FROM_0_BELOW_1 = ("adam_beta1", "adam_beta2", "attention_dropout", "hidden_dropout")


def check_numbers(args: Namespace) -> None:
    """Refuse numbers that are not finite, or not within the range of their flag.

    Args:
        args: All flags, before Megatron's own validation.
    Raises: ConfigError: names the first such flag, its value and its range.
    """
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{_flag(name)} {value} is not a finite number; give one")
    for names, rule, holds in (
        (AT_LEAST_0, "at least 0", lambda value: value >= 0),
        (ABOVE_0, "above 0", lambda value: value > 0),
        (FROM_0_BELOW_1, "at least 0 and below 1", lambda value: 0 <= value < 1),
        (("seed",), f"1 to {LARGEST_SEED:,}", lambda value: 1 <= value <= LARGEST_SEED),
    ):
        for name in names:
            value = getattr(args, name)
            if value is not None and not holds(value):
                raise ConfigError(f"{_flag(name)} {value} is out of range; it must be {rule}")
    _check_samples(args)
    starts = (args.load, args.pretrained_checkpoint, getattr(args, "hf_checkpoint", None))
    for name in ("init_method_std", "embedding_init_method_std"):
        if getattr(args, name) == 0 and not any(starts):
            raise ConfigError(
                f"{_flag(name)} 0 gives random weights that are all 0, whose gradients are 0 at every step; "
                "give one above 0, or start from a checkpoint"
            )


def _check_samples(args: Namespace) -> None:
    """Refuse more samples than Python's `len` of a dataset can give."""
    batch = args.global_batch_size or args.micro_batch_size or 1
    for name, each in (("train_iters", batch), ("train_samples", 1)):
        value = getattr(args, name)
        if value is not None and value * each > sys.maxsize:
            raise ConfigError(
                f"{_flag(name)} {value} asks for more than {sys.maxsize:,} windows in all; give at most "
                f"{sys.maxsize // each}"
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
