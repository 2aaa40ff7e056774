"""A recipe's flags that depend on others, which the user may have given."""

import argparse
from collections.abc import Sequence

from megatron_long.errors import ConfigError


def follow_user(recipe_argv: Sequence[str], user_argv: Sequence[str]) -> list[str]:
    """Let a recipe's flags follow those of the user that they depend on.

    `--min-lr` is the user's `--lr` while the rate is constant, else 0; `--train-samples`, `--fp16` and
    `--step-batch-size-schedule` take the place of `--train-iters`, `--bf16` and `--global-batch-size`; the
    positions reach as far as `--seq-length`.

    Args:
        recipe_argv: The words of the recipe, each value behind its flag.
        user_argv: The words of the command line.
    Returns: The recipe's words, some changed; the user's still follow.
    Raises: ConfigError: a value of these flags that is none.

    >>> recipe = "--lr 2e-5 --min-lr 2e-5 --lr-decay-style constant --train-iters 9 --bf16".split()
    >>> " ".join(follow_user(recipe, "--lr 1e-5 --train-samples 72".split()))
    '--lr 2e-5 --lr-decay-style constant --bf16 --min-lr 1e-5'
    """
    user, recipe = _parse(user_argv), _parse(recipe_argv)
    argv = list(recipe_argv)
    if user.min_lr is None and (user.lr or user.lr_decay_style):
        style = user.lr_decay_style or recipe.lr_decay_style
        rate = user.lr or recipe.lr
        argv = [*_without(argv, "--min-lr"), "--min-lr", rate if style == "constant" else "0"]
    if user.train_samples:
        argv = _without(argv, "--train-iters")
    if user.step_batch_size_schedule:
        argv = _without(argv, "--global-batch-size")
    if user.fp16:
        argv = [word for word in argv if word != "--bf16"]
    positions = recipe.max_position_embeddings
    length = user.seq_length
    if positions and length and user.max_position_embeddings is None and length > positions:
        argv = [
            *_without(argv, "--max-position-embeddings"),
            "--max-position-embeddings",
            str(length),
        ]
    return argv


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    texts = (
        "--lr",
        "--min-lr",
        "--lr-decay-style",
        "--train-samples",
        "--step-batch-size-schedule",
    )
    for flag in texts:
        parser.add_argument(flag)
    for flag in ("--seq-length", "--max-position-embeddings"):
        parser.add_argument(flag, type=int)
    parser.add_argument("--fp16", action="store_true")
    try:
        return parser.parse_known_args(argv)[0]
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; `--help` lists the flags, ours and Megatron's") from None


def _without(argv: Sequence[str], flag: str) -> list[str]:
    """The words without a flag and its value."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word == flag:
            next(words)
        else:
            kept.append(word)
    return kept
