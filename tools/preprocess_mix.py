"""Make a training dataset from a corpus: tokenize it and mix it by source and document length.

    python tools/preprocess_mix.py --input corpus/ --tokenizer tokenizer.model --output dataset \\
        --train-tokens 64M

docs/data_format.md describes what is read and what is written.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from megatron_long.cli import run_tool
from megatron_long.data.documents import (
    DEFAULT_SOURCE_KEY,
    DEFAULT_TEXT_KEY,
    RecordKeys,
    find_inputs,
)
from megatron_long.data.mixture import STRATEGIES, Mixture
from megatron_long.data.preprocess import PreprocessConfig, plan_dataset, preprocess
from megatron_long.data.report import print_sources
from megatron_long.data.shares import NATURAL, SLIMPAJAMA, parse_token_count, read_shares
from megatron_long.files import refuse_overwrite


def main() -> None:
    args = _parser().parse_args()
    config = _config(args)
    if not args.dry_run:
        refuse_overwrite(args.output, force=args.force)
    size_bytes = sum(file.size_bytes for file in find_inputs(args.input))
    interval_s = 0.2 if sys.stderr.isatty() else 30.0
    with tqdm(
        total=size_bytes, unit="B", unit_scale=True, desc="tokenize", mininterval=interval_s
    ) as bar:
        if args.dry_run:
            sources = plan_dataset(config, bar.update)
        else:
            manifest = preprocess(config, args.output, bar.update)
            sources = manifest.sources
    print_sources(sources)
    if args.dry_run:
        print("dry run: nothing was written")
    else:
        print(
            f"{args.output}: {manifest.train.num_tokens:,} training tokens in "
            f"{manifest.train.num_documents:,} documents; fingerprint {manifest.fingerprint[:16]}"
        )


def _config(args: argparse.Namespace) -> PreprocessConfig:
    shares, missing = args.source_shares, "error"
    if shares not in (NATURAL, SLIMPAJAMA):
        shares, missing = read_shares(Path(shares))
    mixture = Mixture(
        train_tokens=parse_token_count(args.train_tokens),
        strategy=args.strategy,
        short_keep_ratio=args.short_keep_ratio,
        long_threshold_tokens=parse_token_count(args.long_threshold, "--long-threshold"),
        source_shares=shares,
        missing_sources=args.missing_sources or missing,
        valid_tokens_per_source=parse_token_count(
            args.valid_tokens_per_source, "--valid-tokens-per-source"
        ),
        allow_repeat=args.allow_repeat,
    )
    return PreprocessConfig(
        inputs=args.input,
        tokenizer=args.tokenizer,
        mixture=mixture,
        seed=args.seed,
        keys=RecordKeys(text=args.text_key, source=args.source_key),
        workers=args.workers,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, help=".jsonl[.gz|.zst] files, or folders")
    add("--tokenizer", type=Path, required=True, help="*.model, tokenizer.json, or their folder")
    add("--output", type=Path, required=True, help="dataset folder to make")
    add("--train-tokens", required=True, metavar="N", help="training tokens: 5B, 64M, 200K")
    add("--strategy", default="per-source", choices=STRATEGIES, help="default: %(default)s")
    add("--short-keep-ratio", type=float, default=0.1, metavar="P", help="default: %(default)s")
    add("--long-threshold", default="4096", metavar="TOKENS", help="long from here: %(default)s")
    shares = f"{NATURAL} (the corpus's own, default), {SLIMPAJAMA}, or a YAML file"
    add("--source-shares", default=NATURAL, metavar="SHARES", help=shares)
    missing = "what to do with shares of sources that the corpus lacks; default: error"
    add("--missing-sources", choices=("error", "drop"), help=missing)
    valid = "tokens each source holds out, in whole documents; default: %(default)s"
    add("--valid-tokens-per-source", default="200K", metavar="N", help=valid)
    repeat = "how many times a document may be used; default: %(default)s"
    add("--allow-repeat", type=int, default=1, metavar="N", help=repeat)
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=1, help="processes that tokenize; default: %(default)s")
    add("--source-key", default=DEFAULT_SOURCE_KEY, metavar="PATH", help="default: %(default)s")
    add("--text-key", default=DEFAULT_TEXT_KEY, metavar="PATH", help="default: %(default)s")
    add("--dry-run", action="store_true", help="print the table of sources, write nothing")
    add("--force", action="store_true", help="replace --output if it exists")
    return parser


if __name__ == "__main__":
    sys.exit(run_tool(main))
