"""Source code: files of packages under RedPajama's rules, of some packages joined by directory."""

import random
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from examples.smollm2_128k.corpus.archives import Text, deb_files, decode, tar_files, zip_files
from examples.smollm2_128k.corpus.download import find_npm, find_wheel
from examples.smollm2_128k.corpus.packages import CODE_PACKAGES, CodePackage

MAX_PACKAGE_CHARS = 11_000_000
MAX_DOCUMENT_CHARS = 800_000
CODE = r"\.(py|pyi|pyx|c|h|cc|cpp|hpp|go|ml|mli|js|mjs|ts|tsx|rs|java|s|S|sh|pl|y|l)$"
NESTED = r"/src/[^/]*\.tar(\.(xz|bz2))?$"
"""Archives inside Debian's source packages."""
GENERATED = re.compile(
    r"(\.min\.|/dist/|/bundles?/|/umd/|/_?cjs/|\.d\.ts$|/testdata/|/locale/|/data/|/node_modules/|/build/"
    r"|/esm5/|/vendor/|\.bundle\.|unicode.*tables|/lib/cjs|/bokehjs|/static/)"
)

File = tuple[str, str]


def read_code(cache: Path, spec: str) -> Iterator[Text]:
    """Yield the source files of a package, in an order fixed by its name, or its directories."""
    package = next(package for package in CODE_PACKAGES if package.spec == spec)
    found = ((name, data) for name, data in _files(cache, package) if is_wanted(name, data))
    files = [(name, text) for name, data in found if is_written(text := decode(data))]
    for name, text in join_directories(files) if package.joined else draw_files(files, spec):
        yield Text("github", text, f"{spec}:{name}", package.license)


def _files(cache: Path, package: CodePackage) -> Iterator[tuple[str, bytes]]:
    if package.kind == "wheel":
        yield from zip_files(find_wheel(cache, package.spec), CODE)
    elif package.kind == "npm":
        yield from tar_files(find_npm(cache, package.spec), CODE)
    else:
        for name, data in deb_files(cache, package.spec, f"{CODE}|{NESTED}"):
            if re.search(NESTED, name):
                yield from tar_files(data, CODE)
            else:
                yield name, data


def is_wanted(name: str, data: bytes) -> bool:
    """Whether a file is of a fair size and, by its name, not generated.

    >>> is_wanted("a/dist/b.js", b"x" * 200), is_wanted("a/src/b.js", b"x" * 200)
    (False, True)
    """
    return 120 < len(data) < 400_000 and not GENERATED.search(f"/{name}")


def is_written(text: str) -> bool:
    """Whether lines and signs are those of code that somebody wrote (RedPajama's rules)."""
    lines = text.split("\n")
    return (
        max(map(len, lines)) <= 1000
        and len(text) / len(lines) <= 100
        and sum(char.isalnum() for char in text) >= 0.25 * len(text)
    )


def join_directories(files: Sequence[File]) -> Iterator[File]:
    """Join the files of each directory of the first two levels, cut at MAX_DOCUMENT_CHARS."""
    placed = sorted((_directory(name), name, text) for name, text in files)
    for directory, group in groupby(placed, lambda item: item[0]):
        text = "\n\n".join(f"# file: {name}\n{content}" for _, name, content in group)
        for start in range(0, len(text), MAX_DOCUMENT_CHARS):
            yield f"{directory}/", text[start : start + MAX_DOCUMENT_CHARS]


def _directory(name: str) -> str:
    parts = name.split("/")
    return "/".join(parts[:2]) if len(parts) > 2 else parts[0]


def draw_files(files: Sequence[File], seed: str) -> Iterator[File]:
    """Draw files in random order until MAX_PACKAGE_CHARS."""
    drawn = list(files)
    random.Random(seed).shuffle(drawn)
    total = 0
    for name, text in drawn:
        total += len(text)
        if total > MAX_PACKAGE_CHARS:
            return
        yield name, text
