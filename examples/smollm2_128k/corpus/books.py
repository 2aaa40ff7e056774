"""Books: free manuals that are a book when their pages are joined, and literature in the public domain."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.smollm2_128k.corpus.archives import HELD_OUT, Text, deb_files, decode
from examples.smollm2_128k.corpus.html_text import INDEX_PAGE, html_to_text
from examples.smollm2_128k.corpus.rdata import read_texts

MIN_BOOK_CHARS = 30_000
MIN_NOVEL_CHARS = 200_000
HELD_OUT_NOVELS = ("persuasion", "mobydick")

Files = dict[str, bytes]
Parts = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class BookRule:
    """How a package becomes books."""

    pattern: str
    """Files that are read."""
    license: str
    join: Callable[[Files, str], Parts]
    """Makes of files, and the rule's `detail`, pairs of (title, text)."""
    detail: str = ""


def one_each(files: Files, detail: str) -> Parts:
    """Make every page a book of its own; titled as its folder if `detail` is "folder"."""
    for name, data in files.items():
        title = name.split("/")[-2] if detail == "folder" else detail or os.path.basename(name)
        yield title, html_to_text(decode(data))


def plain_text(files: Files, title: str) -> Parts:
    """Join text files in the order of the numbers in their names."""
    yield title, "\n\n".join(decode(files[name]) for name in sorted(files, key=natural_order))


def by_name(files: Files, title: str) -> Parts:
    """Join pages in the order of the numbers in their names."""
    yield (
        title,
        "\n\n".join(html_to_text(decode(files[n])) for n in sorted(files, key=natural_order)),
    )


def by_index(files: Files, detail: str) -> Parts:
    """Join pages in the order in which the index page links them; `detail` is TITLE=INDEX."""
    title, _, index_name = detail.partition("=")
    index = next((name for name in files if name.endswith(index_name)), "")
    order: dict[str, None] = {}
    for link in re.findall(r'href="([^"#?]+\.html?)', decode(files.get(index, b""))):
        path = os.path.normpath(os.path.join(os.path.dirname(index), link))
        order.update(dict.fromkeys(name for name in (path, f"./{path}") if name in files))
    order.update(dict.fromkeys(name for name in sorted(files) if name != index))
    yield title, "\n\n".join(html_to_text(decode(files[name])) for name in order)


def by_section(files: Files, detail: str) -> Parts:
    """Join the pages whose names begin alike, as `detail` says, to a book each."""
    groups: dict[str, Files] = {}
    for name in sorted(files):
        if match := re.match(detail, os.path.basename(name)):
            groups.setdefault(match.group(1), {})[name] = files[name]
    for title, group in groups.items():
        yield from by_name(group, title)


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers by their value.

    >>> sorted(["ch10.htm", "ch9.htm"], key=natural_order)
    ['ch9.htm', 'ch10.htm']
    """
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


FREE = "GPL-2+/free doc (see package copyright)"
RUST_BOOKS = (
    "book|reference|rustc|rust-by-example|unstable-book|nomicon|embedded-book|rustdoc|edition-guide"
)
RUST = BookRule(rf"/html/({RUST_BOOKS})/print\.html$", "MIT/Apache-2.0", one_each, "folder")
ADA = BookRule(r"/aarm2012\.txt/.*\.TXT$", "Ada RM (free redistribution)", plain_text, "aarm")
BOOK_PACKAGES = {
    "rust-doc": RUST,
    "debian-handbook": BookRule(
        r"/html/en-US/.*\.html$", "GPL-2+/CC-BY-SA-3.0", by_index, "handbook=index.html"
    ),
    "ada-reference-manual-2012": ADA,
    "anarchism": BookRule(
        r"/html/.*\.html$",
        "GFDL/GPL-2+ (An Anarchist FAQ)",
        by_section,
        r"(sec[A-J]|append\d\d?|app|bib)",
    ),
    "jargon-text": BookRule(r"jargon\.txt$", "public domain", plain_text, "jargon"),
    "mh-book": BookRule(r"/html/.*/.*\.html$", "GPL-2+", by_index, "mh=index.html"),
    "cfi-en": BookRule(r"/html/ch.*\.htm$", "free (cfi licence)", by_name, "cfi"),
    "debian-reference-en": BookRule(
        r"/ch\d+\.en\.html$|/index\.en\.html$", "GPL-2+", by_index, "ref=index.en.html"
    ),
    "r-doc-html": BookRule(r"/R-(exts|intro|admin|ints|lang|data|FAQ)\.html$", FREE, one_each),
    "bash-doc": BookRule(r"bashref\.html$", FREE, one_each),
    "zsh-doc": BookRule(
        r"/html/(?!.*Index).*\.html$", "zsh (MIT-like)", by_index, "zsh=index.html"
    ),
    "autoconf-doc": BookRule(r"autoconf\.html$", FREE, one_each),
    "sbcl-doc": BookRule(r"/sbcl\.html$", FREE, one_each),
    "maxima-doc": BookRule(r"maxima_singlepage\.html$", "GPL-2+", one_each, "maxima"),
    "developers-reference": BookRule(r"/developers-reference\.html$", FREE, one_each),
}
NOVEL_PACKAGES = ("r-cran-janeaustenr", "r-cran-tokenizers")


def read_book(cache: Path, package: str) -> Iterator[Text]:
    """Yield the books of a Debian package."""
    rule = BOOK_PACKAGES[package]
    found = deb_files(cache, package, rule.pattern)
    joined = rule.join in (by_index, by_section, by_name)
    files = {name: data for name, data in found if not (joined and INDEX_PAGE.search(name))}
    for title, text in rule.join(files, rule.detail):
        if len(text) > MIN_BOOK_CHARS:
            yield Text("book", text.strip(), f"{package}:{title}", rule.license)


def read_novels(cache: Path, package: str) -> Iterator[Text]:
    """Yield the novels that an R package ships as data; HELD_OUT_NOVELS are kept out of the corpus."""
    files = dict(deb_files(cache, package, r"/data/Rdata\.rd[bx]$"))
    base = next(iter(files))[:-4]
    for name, text in read_texts(files[f"{base}.rdx"], files[f"{base}.rdb"]).items():
        if len(text) < MIN_NOVEL_CHARS:
            continue
        if name in HELD_OUT_NOVELS:
            yield Text(HELD_OUT, strip_gutenberg(text.lstrip("\ufeff")), name, "public domain")
        else:
            yield Text("book", strip_gutenberg(text), f"{package}:{name}", "public domain")


def strip_gutenberg(text: str) -> str:
    """Take Project Gutenberg's head and foot off a book."""
    text = text.replace("\r\n", "\n")
    head = re.search(r"\*\*\*\s*START OF.*?\*\*\*|\*END\*?THE SMALL PRINT.*?\n", text)
    foot = re.search(r"\*\*\*\s*END OF|\nEnd of (the |this )?Project Gutenberg", text)
    return text[head.end() if head else 0 : foot.start() if foot else len(text)].strip()
