"""A recipe's flags that depend on others, which the user may have given."""

import argparse
from collections.abc import Sequence

from megatron_long.cli import length_tokens
from megatron_long.errors import ConfigError
from megatron_long.flags.recipe import Recipe, windows_of


def follow_user(recipe_argv: Sequence[str], user_argv: Sequence[str]) -> list[str]:
    """Let a recipe's flags follow those of the user that they depend on.

    `--min-lr` is the user's `--lr` while the rate is constant, else 0; `--train-samples`, `--fp16` and
    `--step-batch-size-schedule` replace `--train-iters`, `--bf16` and `--global-batch-size`; the
    positions reach as far as `--seq-length`; `--save-interval` is left to the user, see `--save-minutes`.

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
    argv = _without(recipe_argv, "--save-interval")
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


def keep_budget(
    recipe: Recipe, argv: Sequence[str], user_argv: Sequence[str]
) -> tuple[list[str], str | None]:
    """Keep the recipe's tokens where the user changes `--seq-length` or the batch.

    A window of another length changes the windows of a step, so that a step keeps the recipe's tokens; the
    steps then follow from the tokens of the run. What the user gives (`--global-batch-size`,
    `--train-iters`, `--train-samples`) stays as it is.

    Args:
        argv: The recipe's words, each value behind its flag.
        user_argv: The words of the command line.
    Returns: The words, and what was changed, for the user; None where nothing was.
    """
    user = _parse(user_argv)
    length = user.seq_length or recipe.seq_length
    batch = user.global_batch_size or windows_of(recipe.tokens_per_batch, length)
    if min(length, batch) < 1:
        return list(argv), None  # refused by name later
    changes: dict[str, tuple[int, int | None]] = {}
    if user.step_batch_size_schedule is None and user.global_batch_size is None:
        changes["--global-batch-size"] = batch, recipe.global_batch_size
    if user.train_iters is None and user.train_samples is None:
        if user.step_batch_size_schedule is None:
            steps = max(1, recipe.train_tokens // (batch * length))
            changes["--train-iters"] = steps, recipe.train_iters
        else:
            argv = _without(argv, "--train-iters")
            changes["--train-samples"] = recipe.train_tokens // length, None
    changes = {flag: pair for flag, pair in changes.items() if pair[0] != pair[1]}
    if not changes:
        return list(argv), None
    for flag, (value, _) in changes.items():
        argv = [*_without(argv, flag), flag, str(value)]
    listed = ", ".join(
        f"{flag} {value}" + (f" (was {before})" if before else "")
        for flag, (value, before) in changes.items()
    )
    note = (
        f"--recipe {recipe.name} reads {_billions(recipe.train_tokens)} tokens, "
        f"{_billions(recipe.tokens_per_batch)} a step; to keep this with the flags given, it takes {listed}; "
        f"give {' and '.join(changes)} for another budget"
    )
    return list(argv), note


def _billions(tokens: int) -> str:
    """A number of tokens in words.

    >>> _billions(5_000_000_000), _billions(4_194_304)
    ('5B', '4.19M')
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return str(tokens)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    texts = (
        "--lr",
        "--min-lr",
        "--lr-decay-style",
        "--train-iters",
        "--train-samples",
        "--step-batch-size-schedule",
    )
    for flag in texts:
        parser.add_argument(flag)
    for flag in ("--seq-length", "--max-position-embeddings"):
        parser.add_argument(flag, type=length_tokens)
    parser.add_argument("--global-batch-size", type=int)
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
