"""What mkdocs does not do itself: the first page, pages from the code, links to files of the repository."""

import argparse
import importlib
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")
TRAINING = "train"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as the first page, and the reference."""
    pages = {"index.md": first_page(), **reference()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page, **_: object) -> str:  # type: ignore[no-untyped-def]
    """Links to files outside the pages become links into the repository (REPOSITORY_URL), or mere names."""
    source = REPOSITORY / "docs" / page.file.src_uri
    return LINK.sub(lambda match: _link(match, source.parent), markdown)


def _link(match: re.Match[str], folder: Path) -> str:
    text, target, anchor = match.groups()
    if "://" in target:
        return match[0]
    path = (folder / target).resolve()
    if not path.is_relative_to(REPOSITORY) or path.is_relative_to(REPOSITORY / "docs"):
        return match[0]
    if not path.exists():
        raise FileNotFoundError(f"{target}, a link of {folder.relative_to(REPOSITORY)}")
    url = os.environ.get("REPOSITORY_URL")
    return f"[{text}]({url}/{path.relative_to(REPOSITORY)}{anchor or ''})" if url else text


def first_page() -> str:
    """The README, its links as seen from docs/."""
    text = (REPOSITORY / "README.md").read_text()

    def moved(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        if "://" not in target:
            target = target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"
        return f"[{text}]({target}{anchor or ''})"

    return LINK.sub(moved, text)


def reference() -> dict[str, str]:
    """Pages by path: every command and flag, every recipe."""
    from megatron_long.entry import GROUPS, PARSERS, PROGRAMS

    commands = [
        "# Commands",
        "",
        "`megatron-long COMMAND`, or `python tools/NAME.py` in the repository.",
    ]
    training = ""
    for title, group in GROUPS.items():
        commands += ["", f"## {title.capitalize()}"]
        for name, (module, does) in group.items():
            parser = importlib.import_module(
                f"megatron_long.{PARSERS.get(module, module)}"
            ).build_parser()
            commands += ["", f"### {name}", "", f"{does.capitalize()}.", ""]
            if name == TRAINING:
                commands.append("See [flags of training](training.md).")
                training = "\n".join(["# Flags of training", "", *describe(parser, 2)])
            elif name not in PROGRAMS:
                commands += describe(parser, 4)
    return {
        "reference/commands.md": "\n".join(commands),
        "reference/training.md": training,
        "reference/recipes.md": "\n".join(recipes()),
    }


def describe(parser: argparse.ArgumentParser, level: int) -> list[str]:
    """Tables of a parser's flags, one for each group."""
    lines = []
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.help is not argparse.SUPPRESS]
        commands = [a for a in actions if isinstance(a, argparse._SubParsersAction)]
        actions = [a for a in actions if a not in commands and a.dest != "help"]
        if actions:
            lines += ["#" * level + f" {(group.title or 'flags').capitalize()}", ""]
            lines += ["| flag | meaning | default |", "|---|---|---|"]
            lines += [row(parser, action) for action in actions]
            lines.append("")
        for command in commands:
            for name, own in command.choices.items():
                lines += [f"**{name}**", "", *describe(own, level)]
    return lines


def row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """One flag."""
    formatter = parser._get_formatter()
    names = ", ".join(action.option_strings) or action.dest
    value = (
        ""
        if action.nargs == 0 or not action.option_strings
        else action.metavar
        or (",".join(map(str, action.choices)) if action.choices else action.dest.upper())
    )
    meaning = formatter._expand_help(action) if action.help else ""
    unset = action.default in (None, False, argparse.SUPPRESS) or action.nargs == 0
    shown = " ".join(action.default) if isinstance(action.default, list) else action.default
    default = "" if unset or shown == "" else f"`{shown}`"
    cells = (f"`{names} {value}`".replace(" `", "`"), " ".join(meaning.split()), default)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def recipes() -> list[str]:
    """Each recipe with its flags."""
    from megatron_long.commands.show_recipe import as_bash_array
    from megatron_long.flags.backend import GPU
    from megatron_long.flags.recipe import RECIPES, build_recipe

    lines = [
        "# Recipes",
        "",
        "`--recipe NAME`; [the reasons](../long_context_recipe.md) for each value.",
    ]
    for name, make in RECIPES.items():
        lines += ["", f"## {name}", "", (make.__doc__ or "").splitlines()[0], "", "```bash"]
        lines += [as_bash_array(build_recipe(name, None).to_argv(GPU)), "```"]
    return lines
