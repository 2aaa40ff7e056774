"""Web pages: the HTML of Debian's documentation packages, whole (CommonCrawl) or C4's lines of it (C4)."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.smollm2_128k.corpus.archives import Text, deb_files, decode
from examples.smollm2_128k.corpus.html_text import INDEX_PAGE, c4_lines, html_to_text, is_prose

C4_PERCENT = 38
"""Pages that become C4's; a hash of the name decides, so that no page is in both."""
MAX_PAGE_BYTES = 3_000_000
MAX_DOCUMENT_CHARS = 600_000


@dataclass(frozen=True)
class PageRule:
    """Which files of a package are pages, and their licence."""

    pattern: str
    license: str


PAGE_PACKAGES = {
    "linux-doc-6.1": PageRule(r"/html/.*\.html$", "GPL-2"),
    "python3.11-doc": PageRule(r"/html/.*\.html$", "PSF-2"),
    "postgresql-doc-15": PageRule(r"\.html$", "PostgreSQL"),
    "python-django-doc": PageRule(r"/html/.*\.html$", "BSD-3"),
    "python-sqlalchemy-doc": PageRule(r"/html/.*\.html$", "MIT"),
    "sqlite3-doc": PageRule(r"/sqlite3/(?!releaselog).*\.html$", "public domain"),
    "erlang-doc": PageRule(r"\.html$", "Apache-2.0"),
    "libreoffice-help-en-us": PageRule(r"/en-US/.*\.html$", "MPL-2.0"),
    "git-doc": PageRule(r"\.html$", "GPL-2"),
    "cmake-doc": PageRule(
        r"/html/(manual|module|guide|command|policy|release|cpack_gen)/.*\.html$", "BSD-3"
    ),
    "apache2-doc": PageRule(r"/manual/en/.*\.html$", "Apache-2.0"),
    "nova-doc": PageRule(r"/html/.*\.html$", "Apache-2.0"),
    "neutron-doc": PageRule(r"/html/.*\.html$", "Apache-2.0"),
    "cinder-doc": PageRule(r"/html/.*\.html$", "Apache-2.0"),
    "keystone-doc": PageRule(r"/html/.*\.html$", "Apache-2.0"),
    "swift-doc": PageRule(r"/html/.*\.html$", "Apache-2.0"),
    "nodejs-doc": PageRule(r"/api/.*\.html$", "MIT"),
    "bind9-doc": PageRule(r"/arm/html/.*\.html$|/arm/.*\.html$", "MPL-2.0"),
    "postfix-doc": PageRule(r"/html/.*\.html$", "IPL-1.0/EPL-2.0"),
    "libvirt-doc": PageRule(r"\.html$", "LGPL-2.1+"),
    "exim4-doc-html": PageRule(r"\.html$", "GPL-2"),
    "harden-doc": PageRule(r"/html/en-US/.*\.html$", "GPL-2+"),
    "kicad-doc-en": PageRule(r"\.html$", "GPL-3+/CC-BY-3.0"),
    "octave-doc": PageRule(r"octave\.html/(?!.*Index).*\.html$", "GPL-3+ (free doc)"),
    "python-pandas-doc": PageRule(
        r"/html/(user_guide|getting_started|whatsnew|development|reference/api)/.*\.html$", "BSD-3"
    ),
    "qtbase5-doc-html": PageRule(r"/doc/qt\w+/[^/]+(?<!-members)\.html$", "GFDL-1.3"),
    "qtdeclarative5-doc-html": PageRule(r"/doc/qt\w+/[^/]+(?<!-members)\.html$", "GFDL-1.3"),
    "llvm-16-doc": PageRule(r"\.html$", "Apache-2.0-LLVM"),
    "glance-doc": PageRule(r"/html/.*\.html$", "Apache-2.0"),
    "python-dask-doc": PageRule(r"/html/.*\.html$", "BSD-3"),
    "racket-doc": PageRule(
        r"/(guide|reference|quick|more|web-server|scribble|redex|plot|typed-racket-.*|draw|gui|slideshow|foreign|htdp-.*|raco|tools|math|db|net|parser-tools|syntax|pict|teaching|drracket|stepper|rackunit)/.*\.html$",
        "MIT/Apache-2.0",
    ),
    "wx3.2-doc": PageRule(
        r"/html/(classwx|overview|page|group)[^/]*(?<!-members)\.html$", "wxWindows"
    ),
    "gap-doc": PageRule(r"/doc/(ref|tut|changes)/chap\d+\.html$", "GPL-2+"),
    "debian-policy": PageRule(r"/policy\.html/.*\.html$", "GPL-2+"),
}


def read_pages(cache: Path, package: str) -> Iterator[Text]:
    """Yield the pages of a package as documents of CommonCrawl or C4."""
    rule = PAGE_PACKAGES[package]
    for name, data in deb_files(cache, package, rule.pattern):
        if INDEX_PAGE.search(name) or len(data) > MAX_PAGE_BYTES:
            continue
        text = html_to_text(decode(data))
        if not is_prose(text):
            continue
        if not goes_to_c4(package + name):
            yield Text("cc", text[:MAX_DOCUMENT_CHARS], package, rule.license)
        elif lines := c4_lines(text):
            yield Text("c4", lines, package, rule.license)


def goes_to_c4(name: str) -> bool:
    """Whether a page is read as C4's; the same for a name at all times."""
    digest = hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()
    return int(digest, 16) % 100 < C4_PERCENT
