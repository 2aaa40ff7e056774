"""A corpus that is hard to estimate from a part of it, its true figures, and a tokenizer that counts fast.

46 files from 20 KB to 4 MB: some sources have one small file of their own, others share files; most files are
sorted by length, so the first documents are unlike the last; tokens per byte differ by source and document.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import orjson

THRESHOLD = 1000
NUM_FILES = 46
SMALL_SOURCES = ("Lisp", "Latin", "Chess", "AllShort", "AllLong")
MIXED = {
    "Web": (5.2, 0.9, 4.5),
    "Code": (6.0, 1.2, 2.5),
    "Book": (8.5, 0.7, 3.8),
    "Math": (5.6, 1.0, 2.0),
}
"""Mean and deviation of the logarithm of the bytes, and bytes per token, of sources that share files."""


def counting_tokenizer() -> SimpleNamespace:
    """A tokenizer whose texts say in their first word how many tokens they have."""

    def encode_flat(texts):
        counts = np.array([int(text.partition(" ")[0]) for text in texts], np.int64)
        return np.zeros(int(counts.sum()), np.int32), counts

    return SimpleNamespace(
        encode_flat=encode_flat, vocab_size=100, bos_id=1, eod_id=2, num_by_reference=0
    )


@dataclass
class Truth:
    """Of one source."""

    documents: int = 0
    tokens: int = 0
    long_tokens: int = 0


def write_corpus(folder: Path, seed: int = 0, scale: float = 1.0) -> dict[str, Truth]:
    """Write the files; give the truth of each source."""
    rng = np.random.default_rng(seed)
    truth: dict[str, Truth] = {}
    filler = "ab cd " * 400_000
    for number in range(NUM_FILES):
        size = round(scale * 20_000 * np.exp(rng.uniform(0, 5.3)))
        own = SMALL_SOURCES[number // 9] if number % 9 == 4 else None
        weights = rng.dirichlet([1.0] * len(MIXED))
        rows, written = [], 0
        while written < size:
            name = own or str(rng.choice(list(MIXED), p=weights))
            mean, deviation, per_token = MIXED.get(name, (6.5, 0.8, 3.0))
            if own == "AllShort":
                mean, deviation = 4.5, 0.3
            elif own == "AllLong":
                mean, deviation = 9.5, 0.4
            length = int(min(max(rng.lognormal(mean, deviation), 30), 300_000))
            tokens = max(int(length / per_token * rng.lognormal(0, 0.25)), 1)
            rows.append((length, name, f"{tokens} {filler[: length - len(str(tokens)) - 1]}"))
            written += length + 40
            found = truth.setdefault(name, Truth())
            found.documents += 1
            found.tokens += tokens + 2
            found.long_tokens += (tokens + 2) * (tokens + 2 >= THRESHOLD)
        if number % 3:
            rows.sort(key=lambda row: row[0], reverse=number % 3 == 2)
        lines = [orjson.dumps({"text": text, "source": name}) for _, name, text in rows]
        (folder / f"{number:02d}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return truth
