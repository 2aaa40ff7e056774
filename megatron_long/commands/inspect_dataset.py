"""Show what a dataset holds: its table, single documents, training windows; check it.

python tools/inspect_dataset.py dataset
python tools/inspect_dataset.py dataset --document 7 | less
python tools/inspect_dataset.py dataset --window 3 --seq-length 131072
python tools/inspect_dataset.py dataset --verify --plot lengths.png
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_long.cli import length_tokens, tool_parser
from megatron_long.dataset.inspection import DatasetBrowser
from megatron_long.dataset.manifest import TRAIN_PREFIX, Manifest, read_manifest
from megatron_long.dataset.report_page import write_report
from megatron_long.dataset.tables import plot_sources, print_sources
from megatron_long.dataset.verification import verify_dataset
from megatron_long.errors import ConfigError
from megatron_long.files import atomic_path, refuse_overwrite

IMAGE_SUFFIXES = (".png", ".pdf", ".svg")


def main() -> None:
    args = _parse_args()
    if args.document is not None or args.window is not None:
        show_part(args)
        return
    if args.plot and args.plot.suffix not in IMAGE_SUFFIXES:
        raise ConfigError(f"--plot {args.plot}: the name must end in {', '.join(IMAGE_SUFFIXES)}")
    for flag, path in (("--plot", args.plot), ("--report", args.report)):
        if path:
            refuse_overwrite(path, force=args.force, flag=flag)
    manifest = read_manifest(args.dataset)
    if args.verify:
        for line in verify_dataset(args.dataset):
            print(line)
    show_manifest(manifest)
    if args.plot:
        with atomic_path(args.plot) as path:
            figure = plot_sources(manifest.sources, manifest.mixture["long_threshold_tokens"])
            figure.savefig(path, format=args.plot.suffix[1:], dpi=120)
        print(f"figure: {args.plot}")
    if args.report:
        with atomic_path(args.report, directory=True) as folder:
            write_report(folder, manifest, args.dataset.resolve().name)
        print(f"report: {args.report / 'index.html'}")


def show_manifest(manifest: Manifest) -> None:
    """Print the table of sources and what the dataset is."""
    print_sources(manifest.sources)
    print(
        f"{manifest.train.num_tokens:,} training tokens in {manifest.train.num_documents:,} documents; "
        f"strategy {manifest.mixture['strategy']}, long from "
        f"{manifest.mixture['long_threshold_tokens']:,} tokens, seed {manifest.seed}; "
        f"{manifest.tokenizer.kind} vocabulary of {manifest.tokenizer.vocab_size:,}; "
        f"fingerprint {manifest.fingerprint[:16]}"
    )


def show_part(args: argparse.Namespace) -> None:
    """Print one document, or the documents of one window."""
    browser = DatasetBrowser(args.dataset, args.split)
    if args.document is not None:
        # The text of a corpus may hold anything, a terminal's encoding may not.
        encoding = sys.stdout.encoding or "utf-8"
        text = browser.describe_document(args.document)
        print(text.encode(encoding, "backslashreplace").decode(encoding))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("offset", "tokens", "document"):
        table.add_column(column, justify="right")
    for column in ("part", "source", "from", "text"):
        table.add_column(column, overflow="fold")
    for part in browser.window_parts(args.window, args.seq_length):
        last = part.first_token + part.num_tokens
        whole = part.num_tokens == part.length_tokens
        table.add_row(
            f"{part.offset:,}",
            f"{part.num_tokens:,}",
            f"{part.document:,}",
            "whole" if whole else f"{part.first_token:,}-{last:,} of {part.length_tokens:,}",
            browser.source(part.document),
            browser.place(part.document),
            browser.snippet(part),
        )
    width = None if sys.stdout.isatty() else 200
    Console(markup=False, highlight=False, width=width).print(table)


def build_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    dataset = "folder made by tools/preprocess_mix.py"
    add("dataset", type=Path, nargs="?", metavar="DATASET", help=dataset)
    add("--dataset", type=Path, dest="dataset_flag", metavar="DATASET", help="the same")
    add("--document", type=int, metavar="N", help="print document N, decoded")
    add("--window", type=int, metavar="N", help="list the documents of training window N")
    add("--seq-length", type=length_tokens, metavar="S", help="tokens of a window; with --window")
    split = "train (default), or a source: its held-out documents"
    add("--split", default=TRAIN_PREFIX, metavar="NAME", help=split)
    add("--plot", type=Path, metavar="FILE.png", help="figure to draw (.png, .pdf, .svg)")
    add("--report", type=Path, metavar="FOLDER", help="write figure and HTML page anew, here")
    add("--verify", action="store_true", help="check hashes, index, lengths and tokens")
    add("--force", action="store_true", help="replace --plot or --report if it exists")
    return parser


def _parse_args() -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args()
    if (args.dataset is None) == (args.dataset_flag is None):
        parser.error("give one dataset folder")
    args.dataset = args.dataset or args.dataset_flag
    if (args.window is None) != (args.seq_length is None):
        parser.error("--window N and --seq-length S belong together")
    return args
