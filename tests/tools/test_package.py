"""The wheel: built, installed and used outside the repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
COMPLETE = """
source {script}
complete_words() {{
    COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=()
    _shtab_megatron_long
    echo "${{COMPREPLY[*]}}"
}}
complete_words megatron-long {words}
"""


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd="/",
        env={name: text for name, text in os.environ.items() if name != "PYTHONPATH"} | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the wheel alone."""
    folder = tmp_path_factory.mktemp("package")
    copied = folder / "source"
    shutil.copytree(
        REPOSITORY / "megatron_long",
        copied / "megatron_long",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, copied)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    built = run(*pip, "wheel", *options, copied)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("megatron_long-*-py3-none-any.whl")
    target = run(*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", wheel)
    assert target.returncode == 0, target.stderr
    return folder / "site"


def test_every_module_is_in_the_wheel(installed):
    def modules(folder: Path) -> set[Path]:
        return {path.relative_to(folder) for path in folder.rglob("*.py")}

    assert modules(installed / "megatron_long") == modules(REPOSITORY / "megatron_long")


def test_the_command_runs_outside_the_repository(installed):
    program = installed / "bin" / "megatron-long"
    result = run(program, "recipe", "llama3_8b_128k", PYTHONPATH=str(installed))
    assert "--rotary-base" in result.stdout, result.stderr
    found = run(
        sys.executable,
        "-c",
        "import megatron_long; print(megatron_long.__file__)",
        PYTHONPATH=str(installed),
    )
    assert Path(found.stdout.strip()).parents[1] == installed


@pytest.mark.parametrize("name", [None, "python3.12", "python3.13"])
def test_the_pythons_it_names_read_it(name, installed):
    """Without the packages it needs, which have wheels of their own for each: the list and the syntax.

    None is the Python of this test; the others run where they are installed.
    """
    python = shutil.which(name) if name else sys.executable
    if python is None or run(python, "-V").returncode:
        pytest.skip(f"{name} is not installed")
    listed = run(python, "-m", "megatron_long.entry", PYTHONPATH=str(installed))
    assert "evaluate needle" in listed.stdout, listed.stderr
    compiled = run(
        python, "-W", "error", "-m", "compileall", "-q", "-f", installed / "megatron_long"
    )
    assert compiled.returncode == 0, compiled.stdout


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The completion of bash."""
    from megatron_long.entry import completion

    path = tmp_path_factory.mktemp("completion") / "megatron-long"
    path.write_text(completion("bash"))
    return path


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("evaluate ''", {"needle", "loss", "bookqa"}),
        ("evaluate needle --hays", {"--haystack"}),
        ("train --rotary-b", {"--rotary-base"}),
        ("train --document-m", {"--document-masking"}),
        ("preprocess --executor ''", {"local", "slurm", "ray"}),
        ("convert hf-to-megatron --ver", {"--verify"}),
    ],
)
def test_a_shell_completes_commands_flags_and_choices(words, completed, script):
    result = run("bash", "-c", COMPLETE.format(script=script, words=words))
    assert completed <= set(result.stdout.split()), result.stderr
