"""Print a recipe as the bash array of Megatron flags that it stands for, or a published one as a script.

The array works with any Megatron-LM entry point. The script (docs/recipes.md) makes data and
trains. Where the model's RoPE needs flags that only megatron_long has, standard error names them.
"""

import argparse
import shlex
import sys
from pathlib import Path

from megatron_long.errors import ConfigError
from megatron_long.flags.argv import Argv
from megatron_long.flags.backend import GPU, HOST
from megatron_long.flags.published import PUBLISHED
from megatron_long.flags.published_script import as_script
from megatron_long.flags.recipe import RECIPES, build_recipe
from megatron_long.mixture.shares import parse_token_count
from megatron_long.model.geometry import geometry_from_hf
from megatron_long.model.rope import LLAMA3_ARGUMENTS


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "recipe", nargs="?", help="recipe to print; without it the names are listed"
    )
    parser.add_argument("--hf-config", type=Path, help="model folder or config.json for the shape")
    parser.add_argument(
        "--backend", choices=("gpu", "host"), default="gpu", help="machine the flags are for"
    )
    budget = "tokens of each stage of a published recipe (1B), instead of its own"
    parser.add_argument("--train-tokens", metavar="N", help=budget)
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    if arguments.recipe is None:
        for name, make in (RECIPES | PUBLISHED).items():
            print(f"{name:16} {(make.__doc__ or '').splitlines()[0]}")
        return 0
    _refuse_unused(arguments)
    if arguments.recipe in PUBLISHED:
        published = PUBLISHED[arguments.recipe]()
        if arguments.train_tokens:
            published = published.with_tokens(parse_token_count(arguments.train_tokens))
        print(as_script(published))
        return 0
    model = geometry_from_hf(arguments.hf_config) if arguments.hf_config else None
    recipe = build_recipe(arguments.recipe, model)
    argv = recipe.to_argv(GPU if arguments.backend == "gpu" else HOST)
    print(as_bash_array(argv))
    own = own_flags(argv)
    if own:
        print(
            f"warning: {', '.join(own)}: flags of megatron_long, which stock Megatron-LM refuses; without "
            "them it computes another RoPE, so that this model is to be trained with megatron_long",
            file=sys.stderr,
        )
    return 0


def _refuse_unused(arguments: argparse.Namespace) -> None:
    is_published = arguments.recipe in PUBLISHED
    flag = "--hf-config" if is_published and arguments.hf_config else ""
    flag = "--train-tokens" if arguments.train_tokens and not is_published else flag
    if flag:
        kinds = list(RECIPES if is_published else PUBLISHED)
        raise ConfigError(
            f"{flag} has no effect on the recipe {arguments.recipe}; drop it, or choose one of "
            f"{', '.join(kinds)}"
        )


def own_flags(argv: list[str]) -> list[str]:
    """Those of a recipe's flags that Megatron has not.

    >>> own_flags(["--lr", "1", "--rope-scaling-original-length", "4096"])
    ['--rope-scaling-original-length']
    """
    own = {"--" + name.replace("_", "-") for name in LLAMA3_ARGUMENTS}
    return [flag for flag, _ in Argv(argv).pairs() if flag in own]


def as_bash_array(argv: list[str]) -> str:
    """One flag and its values a line."""
    lines = (f"    {shlex.join(group)}" for group in Argv(argv).groups())
    return "\n".join(["RECIPE_ARGS=(", *lines, ")"])
