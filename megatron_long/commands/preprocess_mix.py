"""Make a training dataset from a corpus: tokenize it and mix it by source and document length.

    python tools/preprocess_mix.py --input corpus/ --tokenizer tokenizer.model --output dataset \\
        --train-tokens 64M

Killed and started again with the same command, it resumes where it was. docs/data_format.md describes what is
read and what is written, docs/preprocess_at_scale.md how to run it on a cluster.
"""

from argparse import ArgumentParser
from pathlib import Path

from megatron_long.cli import length_tokens, tool_parser
from megatron_long.corpus.documents import DEFAULT_SOURCE_KEYS, DEFAULT_TEXT_KEY
from megatron_long.corpus.inputs import is_url
from megatron_long.dataset.tables import print_sources, print_table
from megatron_long.files import refuse_overwrite
from megatron_long.mixture.mixture import STRATEGIES
from megatron_long.mixture.shares import NATURAL, SLIMPAJAMA
from megatron_long.preprocess.dry_run import HEADER, DryRun, expected_rows, plan_dataset
from megatron_long.preprocess.executors import EXECUTORS
from megatron_long.preprocess.preprocess import preprocess
from megatron_long.preprocess.preprocess_config import read_config, work_folder
from megatron_long.preprocess.progress_bar import ProgressBars, print_listing
from megatron_long.preprocess.workdir import sweep


def main() -> None:
    args = build_parser().parse_args()
    config = read_config(args)
    if args.dry_run:
        _print_dry_run(plan_dataset(config, on_listing=print_listing))
        return
    sweep(work_folder(config.work_dir, args.output))
    if not is_url(args.output):
        refuse_overwrite(Path(args.output), force=args.force)
        if not Path(args.output).absolute().parent.exists():
            print(
                f"--output: {Path(args.output).absolute().parent} does not exist and will be made"
            )
    with ProgressBars() as bars:
        manifest = preprocess(config, args.output, bars.update, print_listing)
    print_sources(manifest.sources)
    for warning in manifest.warnings:
        print(f"warning: {warning}")
    if manifest.documents_bad:
        print(
            f"{manifest.documents_bad:,} bad documents were left out; manifest.json lists the first"
        )
    print(
        f"{args.output}: {manifest.train.num_tokens:,} training tokens in "
        f"{manifest.train.num_documents:,} documents; fingerprint {manifest.fingerprint[:16]}"
    )


def _print_dry_run(found: DryRun) -> None:
    if found.planned:
        print_sources(found.planned)
    if found.expected:
        print_table(HEADER, expected_rows(found))
    for note in found.notes:
        print(f"note: {note}")
    if found.planned:
        print("dry run: all of the corpus was read, nothing was written")
        return
    print(
        f"dry run: {found.read_share:.2%} of the corpus was read, in parentheses are 95% intervals; "
        "nothing was written"
    )


def build_parser() -> ArgumentParser:
    parser = tool_parser(__doc__)
    _add_corpus(parser.add_argument_group("corpus").add_argument)
    _add_mixture(parser.add_argument_group("mixture").add_argument)
    _add_run(parser.add_argument_group("run").add_argument)
    return parser


def _add_corpus(add) -> None:  # type: ignore[no-untyped-def]
    files = (
        ".jsonl, .json, .ndjson [.gz|.zst], .parquet, .arrow; folders of them; URLs (s3://, ...)"
    )
    add("--input", nargs="+", required=True, help=files)
    add(
        "--tokenizer",
        type=Path,
        required=True,
        help="*.model (SentencePiece, or Llama-3's tiktoken), tokenizer.json, or their folder",
    )
    engine = "what makes the tokens: auto (the fastest exact), reference"
    add("--engine", default="auto", help=engine)
    separator = (
        "special token that ends each document instead of EOD, without BOS; default: EOD, BOS"
    )
    add("--document-separator", metavar="TOKEN", help=separator)
    key = f"where a record keeps its source; default: {' or '.join(DEFAULT_SOURCE_KEYS)}"
    add("--source-key", metavar="PATH", help=key)
    folder = "the source of a file is its first folder below --input (or the --input folder itself)"
    add("--source-from-folder", action="store_true", help=folder)
    add("--text-key", default=DEFAULT_TEXT_KEY, metavar="PATH", help="default: %(default)s")
    unread = "skip leaves out files of other kinds that are likely to hold documents; default: %(default)s"
    add("--on-unread-file", choices=("stop", "skip"), default="stop", help=unread)
    bad = "skip leaves out what cannot be read and lists it in the manifest; default: %(default)s"
    add("--on-bad-document", choices=("stop", "skip"), default="stop", help=bad)


def _add_mixture(add) -> None:  # type: ignore[no-untyped-def]
    tokens = "training tokens: 5B, 64M, 200K (K is 1,000)"
    add("--train-tokens", required=True, metavar="N", help=tokens)
    strategy = f"{', '.join(STRATEGIES)} NAME=SHARE ...; default: per-source"
    add("--strategy", nargs="+", default=["per-source"], metavar="NAME", help=strategy)
    ratio = "probability of keeping a short document under per-source and global; default: 0.1"
    add("--short-keep-ratio", type=float, metavar="P", help=ratio)
    solved = "instead: thin the short documents of each source until long ones have this share"
    add("--long-token-share", type=float, metavar="SHARE", help=solved)
    plain = (
        "share of the training tokens in documents as they are, next to the upsampled; default: 0"
    )
    add("--short-share", type=float, default=0.0, metavar="SHARE", help=plain)
    long = "long from here (K is 1,024): %(default)s"
    add("--long-threshold", type=length_tokens, default="4K", metavar="TOKENS", help=long)
    cut = "length of pieces under --strategy cut; default: 4K"
    add("--cut-length", type=length_tokens, metavar="TOKENS", help=cut)
    shares = f"{NATURAL} (the corpus's own, default), {SLIMPAJAMA}, or a YAML file"
    add("--source-shares", default=NATURAL, metavar="SHARES", help=shares)
    missing = "what to do with shares of sources that the corpus lacks; default: error"
    add("--missing-sources", choices=("error", "drop"), help=missing)
    valid = "tokens each source holds out, in whole documents; default: %(default)s"
    add("--valid-tokens-per-source", default="200K", metavar="N", help=valid)
    repeat = "how many times a document may be used; default: %(default)s"
    add("--allow-repeat", type=int, default=1, metavar="N", help=repeat)
    add("--seed", type=int, default=0)


def _add_run(add) -> None:  # type: ignore[no-untyped-def]
    add("--output", required=True, help="dataset folder to make, or a URL to copy it to")
    add("--work-dir", type=Path, help="unfinished work; default: OUTPUT.work")
    add("--keep-work", action="store_true", help="do not remove it at the end")
    add("--token-dtype", choices=("auto", "uint16", "int32"), default="auto")
    add("--executor", choices=EXECUTORS, default="local", help="default: %(default)s")
    add("--workers", type=int, default=1, help="processes at a time; default: %(default)s")
    add("--tasks", type=int, default=1000, help="tasks of a stage on a cluster: %(default)s")
    add("--task-memory-gb", type=int, default=4, metavar="GB", help="default: %(default)s")
    add("--slurm-partition", metavar="NAME", help="needed for --executor slurm")
    add("--slurm-time", default="24:00:00", metavar="H:M:S", help="of a task; default: %(default)s")
    more = "more flags of sbatch, without dashes"
    add("--slurm-args", nargs="*", default=[], metavar="NAME=VALUE", help=more)
    add("--dry-run", action="store_true", help="print the table from a sample, write nothing")
    add("--force", action="store_true", help="replace --output, and unfinished work of another run")
