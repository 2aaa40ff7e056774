"""How true is a dry run? A corpus of SlimPajama's shape, sampled many times: do intervals hold the truth?

    python benchmarks/estimates.py --draws 200                                 # coverage
    python benchmarks/estimates.py --draws 1 --documents 10000 --text-mb 64 --tokenizer T.model  # seconds

The corpus has 59,166 compressed files in ten folders, as SlimPajama has, with its sources and document sizes;
only the number of documents in a file is smaller. A file is made when it is opened, by its number, so
nothing is on disk. Without --tokenizer, texts say how many tokens they have, so the truth is known.
"""

import argparse
import dataclasses
import functools
import io
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import fsspec
import numpy as np
import orjson
import zstandard
from fsspec.spec import AbstractFileSystem

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, as the tools are

from megatron_long.cli import run_tool, tool_parser  # noqa: E402
from megatron_long.corpus.documents import RecordKeys  # noqa: E402
from megatron_long.corpus.inputs import InputFile  # noqa: E402
from megatron_long.mixture.admission import Admission  # noqa: E402
from megatron_long.mixture.estimates.intervals import Interval  # noqa: E402
from megatron_long.preprocess.survey import survey_corpus  # noqa: E402
from megatron_long.preprocess.tokenize_file import TokenizeOptions  # noqa: E402
from megatron_long.tokenizer.loading import load_tokenizer  # noqa: E402
from megatron_long.tokenizer.tokenizer_types import Tokenizer  # noqa: E402

NUM_FILES = 59_166
THRESHOLD = 4096
SOURCES = {
    "CommonCrawl": (0.522, 5_600, 1.0, 4.4),
    "C4": (0.267, 2_200, 0.9, 4.5),
    "GitHub": (0.052, 8_000, 1.2, 2.6),
    "Book": (0.042, 380_000, 0.8, 4.2),
    "ArXiv": (0.046, 52_000, 0.6, 3.1),
    "Wikipedia": (0.038, 4_000, 1.1, 3.4),
    "StackExchange": (0.033, 3_000, 0.8, 3.2),
}
"""Share of the bytes, mean bytes of a document, deviation of its logarithm, bytes per token. The shares are
SlimPajama's as its authors give them (Soboleva et al. 2023); the rest is of the same order, and assumed."""
OVERHEAD = 2
EXPANSION = 3.5


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a file holds."""

    documents: int

    @functools.cached_property
    def tables(self) -> tuple[np.ndarray, ...]:
        """Chance, middle, deviation and bytes per token, by source."""
        share, mean, deviation, per_token = np.array(list(SOURCES.values())).T
        chance = share / mean
        return chance / chance.sum(), np.log(mean) - deviation**2 / 2, deviation, per_token

    def draw(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return source, bytes and tokens of the documents of file `number`."""
        rng = np.random.default_rng(number)
        chance, middle, deviation, per_token = self.tables
        # Files differ more than documents drawn alike would: crawls lie together.
        chance = rng.dirichlet(200 * chance + 0.01)
        count = int(self.documents * rng.uniform(0.8, 1.2))
        source = rng.choice(len(SOURCES), count, p=chance)
        sizes = np.exp(middle[source] + deviation[source] * rng.standard_normal(count))
        sizes = np.clip(sizes, 40, 4e6).astype(np.int64)
        noise = np.exp(0.12 * rng.standard_normal(count))
        return source, sizes, np.maximum(sizes / per_token[source] * noise, 1).astype(np.int64)


class MadeFiles(AbstractFileSystem):
    """A file system whose files are made when they are opened: `made://documents/number.jsonl.zst`."""

    protocol = "made"
    seconds = 0.0
    """Spent on making files, which a real corpus does not need."""

    def _open(self, path: str, mode: str = "rb", **kwargs: object) -> io.BytesIO:
        began = time.process_time()
        documents, _, name = path.removeprefix("made://").strip("/").partition("/")
        source, sizes, tokens = Shape(int(documents)).draw(int(name.partition(".")[0]))
        names, filler = list(SOURCES), _filler()
        lines = []
        for s, size, count in zip(source.tolist(), sizes.tolist(), tokens.tolist(), strict=True):
            start = size % 1000
            text = f"{count} {filler[start : start + max(size - len(str(count)) - 1, 0)]}"
            lines.append(orjson.dumps({"text": text, "source": names[s]}))
        packed = zstandard.ZstdCompressor(level=-5).compress(b"\n".join(lines) + b"\n")
        MadeFiles.seconds += time.process_time() - began
        return io.BytesIO(packed)


@functools.lru_cache(1)
def _filler() -> str:
    rng = np.random.default_rng(0)
    syllables = np.array([a + b for a in "bcdfglmnprst" for b in "aeiou"])
    words = ["".join(rng.choice(syllables, n)) for n in rng.integers(1, 4, 20_000)]
    return " ".join(rng.choice(words, 900_000))


def main() -> None:
    args = _parser().parse_args()
    fsspec.register_implementation("made", MadeFiles, clobber=True)
    shape = Shape(args.documents)
    files, truth = make_corpus(shape, is_timed=args.tokenizer is not None)
    print(f"{len(files):,} files, {sum(file.size_bytes for file in files) / 1e9:,.0f} GB")
    tokenizer = load_tokenizer(args.tokenizer, "auto") if args.tokenizer else _counting()
    hits: dict[tuple[str, str], list[bool]] = defaultdict(list)
    widths: dict[tuple[str, str], list[float]] = defaultdict(list)
    total = truth.sum(0)[1]
    for seed in range(args.first, args.first + args.draws):
        options = TokenizeOptions(
            seed, RecordKeys(source="source"), THRESHOLD, Admission(), np.dtype("<u2"), 1, OVERHEAD
        )
        began, MadeFiles.seconds = time.process_time(), 0.0
        estimate = survey_corpus(files, tokenizer, options, int(args.text_mb * 1e6))
        seconds = time.process_time() - began - MadeFiles.seconds
        print(f"draw {seed}: {seconds:.1f} CPU s, {estimate.read_share:.3%} read", file=sys.stderr)
        if args.tokenizer:
            continue
        for index, name in enumerate(SOURCES):
            if name not in estimate.stats.sources:
                hits[name, "found"].append(False)
                continue
            documents, tokens, long_tokens = truth[index].tolist()
            found = estimate.estimate(name)
            figures: dict[str, tuple[Interval, float]] = {
                "documents": (found.documents, documents),
                "tokens": (found.tokens, tokens),
                "share": (found.share, tokens / total),
                "long share": (found.long_share, long_tokens / max(tokens, 1)),
            }
            for key, (interval, true) in figures.items():
                hits[name, key].append(interval.low <= true <= interval.high)
                if true:
                    widths[name, key].append((interval.high - interval.low) / 2 / true)
    for (name, key), held in hits.items():
        print(
            f"{name:14} {key:10} holds the truth in {np.mean(held):.3f} of {len(held)}; "
            f"half the interval is {np.mean(widths[name, key] or [0]):.1%} of the truth"
        )
    if hits:
        print(f"all: {np.mean([np.mean(held) for held in hits.values()]):.3f}")


def make_corpus(shape: Shape, is_timed: bool) -> tuple[list[InputFile], np.ndarray]:
    """Return the list of files, and documents, tokens and long tokens of each source.

    Args:
        is_timed: Only the time is of interest: all files are said to be as large as the first one.
    """
    files: list[InputFile] = []
    truth = np.zeros((len(SOURCES), 3), np.int64)
    for number in range(NUM_FILES):
        folder, file = f"chunk{number % 10 + 1}", f"{number}.jsonl.zst"
        name, path = f"{folder}/{file}", f"made://{shape.documents}/{file}"
        if is_timed and files:
            files.append(InputFile(name, path, files[0].size_bytes, folder=folder))
            continue
        source, sizes, tokens = shape.draw(number)
        lengths = tokens + OVERHEAD
        long = lengths * (lengths >= THRESHOLD)
        for column, values in enumerate((None, lengths, long)):
            truth[:, column] += np.bincount(source, values, len(SOURCES)).astype(np.int64)
        stored = int((sizes.sum() + 40 * len(sizes)) / EXPANSION)
        files.append(InputFile(name, path, stored, folder=folder))
    return files, truth


def _counting() -> Tokenizer:
    def encode_flat(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        counts = np.array([int(text.partition(" ")[0]) for text in texts], np.int64)
        return np.zeros(int(counts.sum()), np.int32), counts

    made: Any = SimpleNamespace(encode_flat=encode_flat, vocab_size=100, num_by_reference=0)
    return cast(Tokenizer, made)


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--draws", type=int, default=10, help="samples; default: %(default)s")
    add("--first", type=int, default=0, help="seed of the first one; default: %(default)s")
    add(
        "--documents",
        type=int,
        default=500,
        help="of a file (SlimPajama: 10000); default: %(default)s",
    )
    add("--text-mb", type=float, default=1.6, help="text to tokenize; default: %(default)s")
    add("--tokenizer", type=Path, help="measure seconds with it")
    return parser


if __name__ == "__main__":
    sys.exit(run_tool(main))
