"""Papers: vignettes of R packages, many of them journal papers, and manuals written in TeX."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from examples.smollm2_128k.corpus.archives import Text, deb_files, decode

MIN_VIGNETTE_BYTES = 6000
MIN_TEX_CHARS = 12_000
CHARS_PER_BACKSLASH = 400
"""A TeX file with fewer backslashes is text or data."""
TEX_LICENSES = {"pari-doc": "GPL-2+", "texlive-latex-recommended-doc": "LPPL/free (TeX Live)"}


def read_vignettes(cache: Path, package: str) -> Iterator[Text]:
    """Yield the vignettes of an R package."""
    pattern = r"(?i)/doc/.*\.(rnw|rnwsave|tex|rtex|ltx|rmd)$"
    for name, data in deb_files(cache, package, pattern):
        if len(data) < MIN_VIGNETTE_BYTES:
            continue
        text = drop_comments(decode(data).replace("\r\n", "\n"))
        if name.lower().endswith(("rnw", "tex", "rnwsave")):
            text = drop_preamble(text)
        if len(text) > MIN_VIGNETTE_BYTES:
            origin = f"{package}:{os.path.basename(name)}"
            yield Text("arxiv", text.strip(), origin, "GPL-2+/see DESCRIPTION")


def read_tex(cache: Path, package: str) -> Iterator[Text]:
    """Yield the TeX files of a manual."""
    for name, data in deb_files(cache, package, r"\.tex$"):
        text = drop_comments(decode(data))
        if len(text) > MIN_TEX_CHARS and text.count("\\") > len(text) / CHARS_PER_BACKSLASH:
            origin = f"{package}:{os.path.basename(name)}"
            yield Text("arxiv", text.strip(), origin, TEX_LICENSES[package])


def drop_comments(text: str) -> str:
    """Leave out lines that are a TeX comment, as RedPajama does.

    >>> drop_comments("a % b\\n  % c\\nd")
    'a % b\\nd'
    """
    return re.sub(r"(?m)^[ \t]*%.*\n", "", text)


def drop_preamble(text: str) -> str:
    r"""Leave out what stands before the document's beginning.

    >>> drop_preamble("\\documentclass{a}\\begin{document}Title\\section{One}")
    'Title\\section{One}'
    """
    section = re.search(r"\\(section|chapter)\b", text)
    if not section or "\\documentclass" not in text[: section.start()]:
        return text
    begin = re.search(r"\\begin\{document\}", text)
    return text[begin.end() if begin else section.start() :]
