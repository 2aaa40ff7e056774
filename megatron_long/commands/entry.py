"""`megatron-long COMMAND [flags]`: the tools and the training of this package, where pip has installed it."""

import importlib
import runpy
import sys

from megatron_long.cli import run_tool
from megatron_long.errors import ConfigError

COMMANDS = {
    "preprocess": ("commands.preprocess_mix", "corpus to mixed, indexed dataset"),
    "inspect": (
        "commands.inspect_dataset",
        "documents and windows of a dataset; its check; its report",
    ),
    "convert": ("commands.convert_checkpoint", "Hugging Face to Megatron checkpoints and back"),
    "average": ("commands.average_checkpoints", "the mean of several checkpoints, as a checkpoint"),
    "plan": ("commands.plan_run", "layouts in which a model fits these GPUs, with memory and time"),
    "recipe": ("commands.show_recipe", "a recipe as a bash array of Megatron flags"),
    "doctor": ("commands.doctor", "what this machine offers for training, and what is missing"),
    "check": ("commands.check_layout", "check a training run before it starts"),
    "train": ("pretrain", "train; this process is one rank"),
    "launch": (
        "launch",
        "torchrun whose jobs save before they end: launch --nproc-per-node 8 -m ...",
    ),
    "evaluate needle": ("commands.evaluate_needle", "needle in a haystack, as a heatmap"),
    "evaluate loss": ("commands.evaluate_loss", "loss by source and position"),
    "evaluate bookqa": ("commands.evaluate_bookqa", "questions about whole novels"),
    "report": ("commands.report", "one HTML page of a run"),
}
"""By name: the module whose `main` runs, and what it does."""
PROGRAMS = ("train", "launch")
"""Commands that are programs of their own: a helper process that they start imports them again."""


def main() -> int:
    """Run the command that the first words name; the others are its flags.

    Returns: Its exit status; 2 after an error of the user.
    """
    words = sys.argv[1:]
    for count in (2, 1):
        name = " ".join(words[:count])
        if len(words) >= count and name in COMMANDS:
            return _run(name, words[count:])
    if words and words[0] not in ("-h", "--help"):
        return run_tool(lambda: _refuse(words))
    return run_tool(lambda: print(_usage()))


def _run(name: str, flags: list[str]) -> int:
    sys.argv = [f"megatron-long {name}", *flags]
    module = f"megatron_long.{COMMANDS[name][0]}"
    if name in PROGRAMS:
        runpy.run_module(module, run_name="__main__", alter_sys=True)  # it ends this process itself
    return run_tool(importlib.import_module(module).main)


def _refuse(words: list[str]) -> None:
    asked = words[0] if words[0] != "evaluate" else " ".join(words[:2])
    raise ConfigError(
        f"megatron-long {asked} is not a command; choose one of: {', '.join(COMMANDS)}"
    )


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {does}" for name, (_, does) in COMMANDS.items()]
    return "\n".join(
        ["usage: megatron-long COMMAND [flags]; COMMAND --help for its flags", "", *lines]
    )


if __name__ == "__main__":
    sys.exit(main())
