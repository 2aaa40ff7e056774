"""`megatron-long COMMAND [flags]`: the tools and the training of this package, where pip has installed it."""

import argparse
import importlib
import runpy
import sys
from pathlib import Path

from megatron_long.cli import run_tool
from megatron_long.errors import ConfigError

GROUPS = {
    "data": {
        "preprocess": ("commands.preprocess_mix", "corpus to mixed, indexed dataset"),
        "inspect": (
            "commands.inspect_dataset",
            "documents and windows of a dataset; its check; its report",
        ),
    },
    "checkpoints": {
        "convert": ("commands.convert_checkpoint", "Hugging Face to Megatron checkpoints and back"),
        "average": (
            "commands.average_checkpoints",
            "the mean of several checkpoints, as a checkpoint",
        ),
    },
    "before training": {
        "plan": (
            "commands.plan_run",
            "layouts in which a model fits these GPUs, with memory and time",
        ),
        "recipe": ("commands.show_recipe", "a recipe as a bash array of Megatron flags"),
        "doctor": ("commands.doctor", "what this machine offers for training, and what is missing"),
        "check": ("commands.check_layout", "check a training run before it starts"),
    },
    "training": {
        "train": ("pretrain", "train; this process is one rank"),
        "launch": (
            "launch",
            "torchrun whose jobs save before they end: launch --nproc-per-node 8 -m ...",
        ),
    },
    "evaluation": {
        "evaluate needle": ("commands.evaluate_needle", "needle in a haystack, as a heatmap"),
        "evaluate ruler": ("commands.evaluate_ruler", "RULER's 13 tasks by context length"),
        "evaluate loss": ("commands.evaluate_loss", "loss by source and position"),
        "evaluate bookqa": ("commands.evaluate_bookqa", "questions about whole novels"),
        "report": ("commands.report", "one HTML page of a run"),
    },
}
"""By purpose and name: the module whose `main` runs, and what it does."""
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
PARSERS = {"pretrain": "command_line"}
"""Modules whose `build_parser` is in another one."""
PROGRAMS = ("train", "launch")
"""Commands that are programs of their own: a helper process that they start imports them again."""
COMPLETION = "completion"
SHELLS = ("bash", "zsh")


def main() -> int:
    """Run the command that the first words name; the others are its flags.

    Returns: Its exit status; 2 after an error of the user.
    """
    words = sys.argv[1:]
    for count in (2, 1):
        name = " ".join(words[:count])
        if len(words) >= count and name in COMMANDS:
            return _run(name, words[count:])
    if words[:1] == [COMPLETION] and len(words) == 2 and words[1] in SHELLS:
        return run_tool(lambda: print(completion(words[1])))
    if words and words[0] not in ("-h", "--help"):
        return run_tool(lambda: _refuse(words))
    return run_tool(lambda: print(_usage()))


def completion(shell: str) -> str:
    """Return the script that completes commands and flags in a shell, files and choices included.

    Args:
        shell: One of `SHELLS`.
    """
    import shtab

    root = argparse.ArgumentParser(prog="megatron-long", description="stretch a Llama to 128K")
    commands = root.add_subparsers()
    groups: dict[str, argparse._SubParsersAction] = {}
    for name, (module, does) in COMMANDS.items():
        first, _, second = name.partition(" ")
        if second and first not in groups:
            groups[first] = commands.add_parser(first, help=first).add_subparsers()
        own = importlib.import_module(f"megatron_long.{PARSERS.get(module, module)}").build_parser()
        for action in own._actions:
            if action.type is Path or action.metavar in ("PATH", "FILE", "FOLDER"):
                action.complete = shtab.FILE
        place = groups[first] if second else commands
        place.add_parser(second or first, parents=[own], add_help=False, help=does)
    shell_parser = commands.add_parser(COMPLETION, help="this script")
    shell_parser.add_argument("shell", choices=SHELLS)
    return shtab.complete(root, shell)


def _run(name: str, flags: list[str]) -> int:
    sys.argv = [f"megatron-long {name}", *flags]
    module = f"megatron_long.{COMMANDS[name][0]}"
    if name in PROGRAMS:
        runpy.run_module(module, run_name="__main__", alter_sys=True)  # it ends this process itself
    return run_tool(importlib.import_module(module).main)


def _refuse(words: list[str]) -> None:
    asked = " ".join(words[:2] if words[0] in ("evaluate", COMPLETION) else words[:1])
    choices = ", ".join([*COMMANDS, *(f"{COMPLETION} {shell}" for shell in SHELLS)])
    raise ConfigError(f"megatron-long {asked} is not a command; choose one of: {choices}")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: megatron-long COMMAND [flags]; COMMAND --help for its flags"]
    for title, group in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {name:{width}}  {does}" for name, (_, does) in group.items()]
    lines += ["", "shell:", f"  {COMPLETION:{width}}  bash or zsh: the script that completes flags"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
