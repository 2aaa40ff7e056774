"""Show what a dataset holds: the table of sources and, with --plot, lengths and shares as a figure.

python tools/inspect_dataset.py --dataset dataset --plot lengths.png
"""

import argparse
import sys
from pathlib import Path

from megatron_long.cli import run_tool
from megatron_long.data.manifest import read_manifest, verify_files
from megatron_long.data.report import plot_sources, print_sources
from megatron_long.errors import ConfigError
from megatron_long.files import atomic_path, refuse_overwrite

IMAGE_SUFFIXES = (".png", ".pdf", ".svg")


def main() -> None:
    args = _parse_args()
    manifest = read_manifest(args.dataset)
    if args.plot:
        if args.plot.suffix not in IMAGE_SUFFIXES:
            raise ConfigError(
                f"--plot {args.plot}: the name must end in {', '.join(IMAGE_SUFFIXES)}"
            )
        refuse_overwrite(args.plot, force=args.force, flag="--plot")
    if args.verify:
        verify_files(args.dataset, manifest)
        print("every file has the hash of the manifest")
    print_sources(manifest.sources)
    print(
        f"{manifest.train.num_tokens:,} training tokens in {manifest.train.num_documents:,} documents; "
        f"strategy {manifest.mixture['strategy']}, long from "
        f"{manifest.mixture['long_threshold_tokens']:,} tokens, seed {manifest.seed}; "
        f"{manifest.tokenizer.kind} vocabulary of {manifest.tokenizer.vocab_size:,}; "
        f"fingerprint {manifest.fingerprint[:16]}"
    )
    if args.plot:
        with atomic_path(args.plot) as path:
            figure = plot_sources(manifest.sources, manifest.mixture["long_threshold_tokens"])
            figure.savefig(path, format=args.plot.suffix[1:], dpi=120)
        print(f"figure: {args.plot}")


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", type=Path, required=True, help="folder made by tools/preprocess_mix.py")
    add("--plot", type=Path, metavar="FILE.png", help="figure to draw (.png, .pdf, .svg)")
    add("--verify", action="store_true", help="check the hash of every file")
    add("--force", action="store_true", help="replace --plot if it exists")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_tool(main))
