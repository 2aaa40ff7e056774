"""The documentation is built as a site: no page left out, no link or anchor that leads nowhere."""

import html
import os
import re
import subprocess
import sys
from argparse import SUPPRESS
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = REPOSITORY / "docs"


def build(site: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"} | variables
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages; `--strict` refuses what mkdocs warns of."""
    folder = tmp_path_factory.mktemp("site") / "site"
    built = build(folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def text_of(page: Path) -> str:
    body = re.sub(r"<(script|style).*?</\1>", "", page.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_every_page_is_in_the_navigation(site):
    for page in PAGES.rglob("*.md"):
        path = page.relative_to(PAGES).with_suffix("")
        assert (site / path / "index.html").is_file()
        assert f'"{path}/"' in (site / "index.html").read_text(), page.name


def test_the_reference_has_every_flag(site):
    from megatron_long.command_line import build_parser
    from megatron_long.commands.preprocess_mix import build_parser as preprocess_parser
    from megatron_long.entry import COMMANDS

    commands = text_of(site / "reference" / "commands" / "index.html")
    assert all(f" {name} " in commands for name in COMMANDS)
    training = text_of(site / "reference" / "training" / "index.html")
    for page, parser in ((commands, preprocess_parser()), (training, build_parser())):
        shown = [a for a in parser._actions if a.option_strings and a.help is not SUPPRESS]
        flags = {action.option_strings[-1] for action in shown}
        assert [flag for flag in sorted(flags - {"--help"}) if f"{flag} " not in page] == []


def test_the_reference_has_every_recipe(site):
    from megatron_long.flags.recipe import RECIPES

    recipes = text_of(site / "reference" / "recipes" / "index.html")
    assert all(f" {name} " in recipes for name in RECIPES)
    assert "--rotary-base" in recipes


def test_no_page_asks_another_host(site):
    """But for links that a reader follows."""
    pattern = re.compile(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"')
    asked = {url for page in site.rglob("*.html") for url in pattern.findall(page.read_text())}
    assert asked == set()
