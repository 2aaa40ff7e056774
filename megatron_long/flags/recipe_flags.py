"""A recipe's flags that depend on others, which the user may have given."""

from collections.abc import Sequence

from megatron_long.cli import length_tokens
from megatron_long.flags.argv import Argv
from megatron_long.flags.recipe import RECIPES, Recipe, windows_of
from megatron_long.model.rope import BaseRope
from megatron_long.model.rope_stretch import ntk_rotary_base

REPLACED = {
    "--train-samples": "--train-iters",
    "--step-batch-size-schedule": "--global-batch-size",
    "--fp16": "--bf16",
}
"""Flags of the user, and those of the recipe that they replace."""


def follow_user(recipe_argv: Sequence[str], user_argv: Sequence[str]) -> Argv:
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
    user, recipe = Argv(user_argv), Argv(recipe_argv)
    argv = recipe.without("--save-interval")
    rate, style = user.value("--lr"), user.value("--lr-decay-style")
    if not user.given("--min-lr") and (rate or style):
        is_constant = (style or recipe.value("--lr-decay-style")) == "constant"
        argv = argv.replaced("--min-lr", (rate or recipe.value("--lr")) if is_constant else 0)
    for given, superseded in REPLACED.items():
        if user.given(given):
            argv = argv.without(superseded)
    positions = recipe.parsed("--max-position-embeddings", length_tokens)
    length = user.parsed("--seq-length", length_tokens)
    if positions and length and length > positions and not user.given("--max-position-embeddings"):
        argv = argv.replaced("--max-position-embeddings", length)
    return argv


def keep_budget(
    recipe: Recipe, argv: Sequence[str], user_argv: Sequence[str]
) -> tuple[Argv, str | None]:
    """Keep the recipe's tokens where the user changes `--seq-length` or the batch.

    A window of another length changes the windows of a step, so that a step keeps the recipe's tokens; the
    steps then follow from the tokens of the run. What the user gives (`--global-batch-size`,
    `--train-iters`, `--train-samples`) stays as it is.

    Args:
        argv: The recipe's words, each value behind its flag.
        user_argv: The words of the command line.
    Returns: The words, and what was changed, for the user; None where nothing was.
    """
    user, argv = Argv(user_argv), Argv(argv)
    has_schedule = user.given("--step-batch-size-schedule")
    length = user.parsed("--seq-length", length_tokens) or recipe.seq_length
    batch = user.parsed("--global-batch-size", int) or windows_of(recipe.tokens_per_batch, length)
    if min(length, batch) < 1:
        return argv, None  # rejected later
    changes: dict[str, tuple[int, int | None]] = {}
    if not has_schedule and not user.given("--global-batch-size"):
        changes["--global-batch-size"] = batch, recipe.global_batch_size
    if not user.given("--train-iters", "--train-samples"):
        if not has_schedule:
            steps = max(1, recipe.train_tokens // (batch * length))
            changes["--train-iters"] = steps, recipe.train_iters
        else:
            argv = argv.without("--train-iters")
            changes["--train-samples"] = recipe.train_tokens // length, None
    changes = {flag: pair for flag, pair in changes.items() if pair[0] != pair[1]}
    if not changes:
        return argv, None
    for flag, (value, _) in changes.items():
        argv = argv.replaced(flag, value)
    listed = ", ".join(
        f"{flag} {value}" + (f" (was {before})" if before else "")
        for flag, (value, before) in changes.items()
    )
    note = (
        f"--recipe {recipe.name} reads {_billions(recipe.train_tokens)} tokens, "
        f"{_billions(recipe.tokens_per_batch)} a step; to keep this with the flags given, it takes {listed}; "
        f"give {' and '.join(changes)} for another budget"
    )
    return argv, note


def base_advice(recipe: Recipe, user_argv: Sequence[str]) -> str | None:
    """Say that a recipe's RoPE base was chosen for another model, where it is.

    Args:
        recipe: With the geometry of the model that is trained.
        user_argv: The words of the command line.
    Returns: The advice; None for the recipe's own model or one like it, a RoPE that is scaled, kept or
        chosen by the user, and a recipe of the user.
    """
    if recipe.name not in RECIPES or Argv(user_argv).given("--rotary-base", "--rope-method"):
        return None
    meant, model = RECIPES[recipe.name]().model, recipe.model
    own, given = ((int(m.rotary_base), m.max_position_embeddings) for m in (meant, model))
    if type(model.rope) is not BaseRope or own == given or recipe.rotary_base == given[0]:
        return None
    length = Argv(user_argv).parsed("--seq-length", length_tokens) or recipe.seq_length
    if length <= given[1]:
        least = given[0]
    else:
        least = ntk_rotary_base(*given, length, factor=1, head_size=model.kv_channels)
    return (
        f"--recipe {recipe.name} trains with RoPE base {recipe.rotary_base:,}, chosen for a model of "
        f"base {own[0]:,} and {own[1]:,} tokens; this one has base {given[0]:,} and {given[1]:,} tokens, for "
        f"which {least:,} stretches the longest wavelength as much as the context, to {length:,} tokens "
        "(recipes take 2 to 15 times that); choose with --rotary-base"
    )


def _billions(tokens: int) -> str:
    """A number of tokens in words.

    >>> _billions(5_000_000_000), _billions(4_194_304)
    ('5B', '4.19M')
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return str(tokens)
