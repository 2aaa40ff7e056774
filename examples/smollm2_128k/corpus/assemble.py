"""Choose among all documents and write the corpus: each text once, sources up to a size, a fixed order."""

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import orjson

from examples.smollm2_128k.corpus.archives import HELD_OUT, Text

SOURCES = {
    "cc": "RedPajamaCommonCrawl",
    "c4": "RedPajamaC4",
    "github": "RedPajamaGithub",
    "book": "RedPajamaBook",
    "arxiv": "RedPajamaArXiv",
    "wikipedia": "RedPajamaWikipedia",
    "stackexchange": "RedPajamaStackExchange",
}
"""Files and the sources' names in SlimPajama."""
MAX_SOURCE_CHARS = {"github": 110e6, "cc": 150e6, "c4": 70e6, "wikipedia": 60e6}
COMPARED_CHARS = 4000
"""Of two documents that begin alike for so long, but for case and signs, the second is dropped."""
CHARS_PER_TOKEN = 4
SEED = 0


def select(texts: Iterable[Text], max_chars: float, seen: set[bytes]) -> list[Text]:
    """Take documents that were not seen yet, until `max_chars`.

    Args:
        seen: Digests of the documents taken before; updated.

    >>> texts = [Text("cc", text, "x", "") for text in ("One, two.", "one two", "three", "four")]
    >>> [text.text for text in select(texts, 15, set())]
    ['One, two.', 'three']
    """
    chosen, total = [], 0
    for text in texts:
        start = re.sub(r"\W+", "", text.text[:COMPARED_CHARS]).lower()
        digest = hashlib.md5(start.encode("utf-8", "replace"), usedforsecurity=False).digest()
        if digest in seen:
            continue
        if total + len(text.text) > max_chars:
            break
        seen.add(digest)
        total += len(text.text)
        chosen.append(text)
    return chosen


def write_corpus(texts: Sequence[Text], folder: Path) -> dict[str, dict[str, Any]]:
    """Write `<source>.jsonl`, `heldout/*.txt` and `stats.json`; gives the figures of each source."""
    (folder / HELD_OUT).mkdir()
    for text in texts:
        if text.source == HELD_OUT:
            (folder / HELD_OUT / f"{text.origin}.txt").write_text(text.text, encoding="utf-8")
    seen: set[bytes] = set()
    order = random.Random(SEED)
    stats = {}
    for source in SOURCES:
        found = [text for text in texts if text.source == source]
        order.shuffle(found)
        chosen = select(found, MAX_SOURCE_CHARS.get(source, float("inf")), seen)
        path = folder / f"{source}.jsonl"
        with path.open("wb") as file:
            file.writelines(to_line(text) for text in chosen)
        stats[source] = describe(chosen, path.stat().st_size)
    (folder / "stats.json").write_bytes(orjson.dumps(stats, option=orjson.OPT_INDENT_2))
    return stats


def to_line(text: Text) -> bytes:
    """Return a document's line."""
    meta = {
        "redpajama_set_name": SOURCES[text.source],
        "src": text.origin,
        "license": text.license,
    }
    return orjson.dumps({"text": text.text, "meta": meta}, option=orjson.OPT_APPEND_NEWLINE)


def describe(texts: Sequence[Text], size_bytes: int) -> dict[str, Any]:
    """Return number, size and lengths of a source's documents, and the part of each package."""
    lengths = sorted(len(text.text) // CHARS_PER_TOKEN for text in texts)
    packages: dict[str, dict[str, int]] = {}
    for text in texts:
        entry = packages.setdefault(text.origin.split(":")[0], {"documents": 0, "chars": 0})
        entry["documents"] += 1
        entry["chars"] += len(text.text)
    return {
        "documents": len(texts),
        "size_bytes": size_bytes,
        "length_tokens": {
            "median": lengths[len(lengths) // 2] if lengths else 0,
            "mean": sum(lengths) // max(1, len(lengths)),
            "max": max(lengths, default=0),
        },
        "packages": dict(sorted(packages.items(), key=lambda item: -item[1]["chars"])),
    }
