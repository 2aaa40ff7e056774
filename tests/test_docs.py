"""What the pages for contributors name is there, and docs/design.md has each room in the order of imports."""

import argparse
import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_rooms import FLOORS

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "megatron_long"
PAGES = ("docs/design.md", "docs/glossary.md", "CONTRIBUTING.md")
DESIGN = (REPOSITORY / "docs" / "design.md").read_text()
ROOMS = re.findall(r"^\| `(\w+)` \|", DESIGN, flags=re.MULTILINE)
FOLDERS = ("megatron_long", "tests", "tools", "examples", "benchmarks", "docs")


def module_of(parts: list[str]) -> tuple[Path, list[str]]:
    """The file of a dotted name, and what of the name is within it."""
    path = PACKAGE
    for number, part in enumerate(parts):
        if (path / f"{part}.py").is_file():
            return path / f"{part}.py", parts[number + 1 :]
        path /= part
        if not path.is_dir():
            break
    return path, []


def members(body: list[ast.stmt]) -> Iterator[tuple[str, list[ast.stmt]]]:
    """Names that a module or a class defines, with what stands in them."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.body
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, []
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                yield from ((name.id, []) for name in names if isinstance(name, ast.Name))


def is_there(name: str) -> bool:
    """Whether a dotted name, relative to the package, is defined."""
    path, inside = module_of(name.split("."))
    if path.is_dir():
        return not inside
    if not path.is_file():
        return False
    body = ast.parse(path.read_text()).body
    for part in inside:
        found = dict(members(body))
        if part not in found:
            return False
        body = found[part]
    return True


@pytest.mark.parametrize("page", PAGES)
def test_names_and_paths_are_there(page):
    quoted = re.findall(r"`([^`\n]+)`", (REPOSITORY / page).read_text())
    names = [
        word
        for word in quoted
        if re.fullmatch(r"\w+(\.\w+)+", word) and word.split(".")[0] in ROOMS
    ]
    paths = [
        word
        for word in quoted
        if re.fullmatch(r"[\w./]+", word) and word.partition("/")[0] in FOLDERS and "/" in word
    ]
    assert len(names) > 10
    missing = [name for name in names if not is_there(name)]
    missing += [path for path in paths if not (REPOSITORY / path).exists()]
    assert not missing


def test_a_name_that_is_not_there_is_found():
    assert is_there("training.batch.get_batch")
    assert is_there("evaluation.needle.cases.NeedleCase.row")
    assert not is_there("training.batch.get_batches")
    assert not is_there("training.batches")
    assert not is_there("evaluation.needle.cases.NeedleCase.rows")


@pytest.mark.parametrize("page", [*PAGES, "docs/CHANGELOG.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (REPOSITORY / page).read_text())
    folder = (REPOSITORY / page).parent
    assert not [link for link in links if not (folder / link).exists()]


def test_each_room_is_told_in_the_order_of_imports():
    place = {room: number for number, floor in enumerate(FLOORS) for room in floor.split()}
    assert sorted(ROOMS) == sorted(place)
    assert [place[room] for room in ROOMS] == sorted(place.values())


def test_changelog_is_kept():
    """Keep a Changelog: what is unreleased, then versions, the newest first, with known headings."""
    text = (REPOSITORY / "docs" / "CHANGELOG.md").read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    names = [section.split()[0] for section in sections]
    versions = [tuple(map(int, name.split("."))) for name in names[names[0] == "Unreleased" :]]
    assert versions == sorted(versions, reverse=True)
    kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    for section in sections:
        headings = re.findall(r"^### (.+)$", section, flags=re.MULTILINE)
        assert headings
        assert headings == [kind for kind in kinds if kind in headings]
        assert "\n- " not in section.partition("\n### ")[0]


def test_the_newest_dated_version_is_the_package_s():
    from megatron_long import __version__

    changes = (REPOSITORY / "docs" / "CHANGELOG.md").read_text()
    dated = re.findall(r"^## (\S+) - \d{4}-\d\d-\d\d$", changes, flags=re.MULTILINE)
    assert dated[0] == __version__


OF_OTHERS = {
    "pip": "--no-build-isolation --no-deps",
    "docker": "--file --ipc --shm-size --tag --target --ulimit --volume",
    "sbatch": "--nodes --batch --mem --signal",
    "pytest": "--dist --maxschedchunk",
    "lm_eval": "--batch_size --model --model_args --output_path",
    "vllm": "--max-model-len",
    "nvidia-resiliency-ext": "--ft-rank-out-of-section-timeout --ft-rank-section-timeouts",
    "benchmarks": "--layers",
}
"""Flags in the pages that are another program's."""


def flags_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from flags_of(inner)


def test_every_flag_in_the_pages_exists():
    from megatron_long.entry import COMMANDS, PARSERS

    known = {flag for flags in OF_OTHERS.values() for flag in flags.split()}
    for module, _ in COMMANDS.values():
        found = importlib.import_module(f"megatron_long.{PARSERS.get(module, module)}")
        known |= set(flags_of(found.build_parser()))
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")]
    for page in pages:
        if page.stem != "CHANGELOG" and page.parent.name != "results":  # past flags; benchmarks
            named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", page.read_text()))
            assert named <= known, page.name
