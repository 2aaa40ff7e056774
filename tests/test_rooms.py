"""The rooms of the package: each imports only from rooms below it, and modules make no circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_long"
FLOORS = (
    "errors",
    "files cli pickles hashing machine freed_memory differences",
    "job corpus tokenizer model",
    "dataset",
    "mixture",
    "preprocess",
    "checkpoint",
    "flags",
    "engine",
    "training",
    "conversion evaluation planning",
    "command_line launch",
    "pretrain",
    "layout_probe commands",
    "entry",
)
"""From the lowest; rooms of one floor do not import each other. docs/design.md says what each is for."""
MOST_FILES, MOST_LINES = 14, 400
"""Of a room, without those of its inner rooms; of a file."""
MOST_COMMAND_LINES = 150
"""Of a command: flags, a call of the package, printing."""


def floor_of() -> dict[str, int]:
    return {room: number for number, floor in enumerate(FLOORS) for room in floor.split()}


def modules() -> dict[str, Path]:
    paths = (path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports anywhere, also where it does so late or for types."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_long"):
            parent = (node.module or "").removeprefix("megatron_long").removeprefix(".")
            for alias in node.names:
                inner = f"{parent}.{alias.name}".removeprefix(".")
                yield inner if inner in known else parent
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("megatron_long."):
                    yield alias.name.removeprefix("megatron_long.")


@pytest.fixture(scope="module")
def arrows() -> dict[str, list[str]]:
    known = modules()
    return {name: sorted(set(imported(path, known))) for name, path in known.items()}


def test_every_module_is_in_a_room_and_every_import_is_known(arrows):
    floors = floor_of()
    assert {name.split(".")[0] for name in arrows} == set(floors)
    unknown = {target for targets in arrows.values() for target in targets} - set(arrows)
    assert unknown <= {"", *floors, *(f"{name.rpartition('.')[0]}" for name in arrows)}


def test_no_arrow_goes_upwards(arrows):
    floors = floor_of()
    upward = [
        f"{name} imports {target}"
        for name, targets in arrows.items()
        for target in targets
        if name.split(".")[0] != target.split(".")[0]
        if floors[target.split(".")[0]] >= floors[name.split(".")[0]]
    ]
    assert not upward, "\n".join(upward)


def test_no_circle(arrows):
    rest = {name: set(targets) & set(arrows) for name, targets in arrows.items()}
    while free := [name for name, targets in rest.items() if not targets]:
        for name in free:
            del rest[name]
        for targets in rest.values():
            targets.difference_update(free)
    assert not rest, f"a circle is among {sorted(rest)}"


def test_two_files_never_share_a_name():
    names = [path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert not {name for name in names if names.count(name) > 1}


def test_rooms_and_files_are_small():
    folders = {path.parent for path in modules().values()}
    full = [f for f in folders if len(list(f.glob("*.py"))) > MOST_FILES]
    long = [f"{p}" for p in modules().values() if len(p.read_text().splitlines()) > MOST_LINES]
    assert not full + long


def test_commands_are_thin():
    commands = (path for path in modules().values() if path.parent.name == "commands")
    assert not [p for p in commands if len(p.read_text().splitlines()) > MOST_COMMAND_LINES]
