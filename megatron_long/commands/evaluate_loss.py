"""Measure a checkpoint's loss by source and by position in the document.

Every held-out document of the dataset (`valid/<source>`) gives its first `--context-length` tokens.
The table has a row for each source and a column for each bucket of positions. Flags that are not
listed here go to Megatron, such as --tensor-model-parallel-size and --context-parallel-size.

    torchrun --nproc-per-node 4 tools/evaluate_loss.py --checkpoint CKPT --dataset DATA \\
        --context-length 131072 --output loss.json --plot loss.png --compare before.json \\
        --tensor-model-parallel-size 2 --context-parallel-size 2

With --text in the place of --dataset, long texts are cut into rows of --context-length tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_long.cli import length_tokens, tool_parser
from megatron_long.errors import DataError
from megatron_long.evaluation.input_checks import (
    check_context_length,
    check_dataset_vocabulary,
    check_output,
    open_tokenizer,
    positive_int,
)
from megatron_long.evaluation.loss.held_out import HeldOutDocument, open_held_out, select_documents
from megatron_long.evaluation.loss.loss_report import (
    LossReport,
    LossSettings,
    check_comparable,
    format_table,
    read_loss_report,
    write_loss_report,
)
from megatron_long.evaluation.loss.loss_table import (
    build_table,
    format_loss_table,
    table_figure,
    write_loss_csv,
)
from megatron_long.evaluation.loss.plain_text import hash_texts, open_texts
from megatron_long.evaluation.loss.position_loss import (
    count_positions,
    default_buckets,
    loss_by_position,
    parse_buckets,
)
from megatron_long.evaluation.models import (
    ModelChoice,
    add_model_flags,
    choose_model,
    open_model,
    warn_beyond_rope,
)


@dataclass(frozen=True)
class Preparation:
    """All that is known before the model is built."""

    settings: LossSettings
    choice: ModelChoice
    documents: list[HeldOutDocument]
    earlier: list[tuple[str, LossReport]]
    """Reports to compare with, by name, the baseline first."""


def build_parser() -> argparse.ArgumentParser:
    """Give the parser of this tool's own flags."""
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add_model_flags(parser)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--dataset", type=Path, help="folder written by preprocess_mix.py")
    data.add_argument(
        "--text", type=Path, nargs="+", help="instead: long text files, UTF-8; each is a source"
    )
    add(
        "--context-length",
        type=length_tokens,
        required=True,
        help="tokens taken of each document, a multiple of 2 * --context-parallel-size if that is not 1",
    )
    add("--output", type=Path, required=True, help="JSON file to write")
    add("--plot", type=Path, help="PNG file for loss against position")
    add(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        help="JSON of earlier runs, the baseline first: differences to it as the paper's table 5, "
        "printed and next to --output as -table.csv and -table.png",
    )
    add("--name", default="this model", help="its name in the table (default: %(default)s)")
    add(
        "--buckets",
        help="positions in tokens like 0-4096,4096-131072, each without its end; default: split "
        "at 4096 tokens, or at an eighth of --context-length if that is less",
    )
    add("--training-length", type=length_tokens, help="old context in tokens, marked in the plot")
    _add_document_flags(parser)
    add("--force", action="store_true", help="replace files that exist")
    return parser


def _add_document_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--min-document-tokens",
        type=length_tokens,
        default=2,
        help="leave shorter documents out; give --context-length + 1 to have the same documents "
        "at every position (default: %(default)s)",
    )
    add("--max-documents-per-source", type=positive_int, help="take only the first so many")


def prepare(args: argparse.Namespace, megatron_argv: Sequence[str]) -> Preparation:
    """Check everything that can be wrong and give what is to be measured."""
    tables = table_paths(args.output) if args.compare else ()
    for flag, path in (
        ("--output", args.output),
        ("--plot", args.plot),
        *(("--output", t) for t in tables),
    ):
        if path is not None:
            check_output(path, force=args.force, flag=flag)
    check_context_length(args.context_length, megatron_argv)
    choice = choose_model(args, megatron_argv)
    documents, hashed = choose_documents(args, choice)
    settings = describe_settings(args, megatron_argv, choice, hashed)
    names = distinct_names(args.compare)
    earlier = [
        (name, read_loss_report(path)) for name, path in zip(names, args.compare, strict=True)
    ]
    counts = count_positions(documents, args.context_length, settings.buckets)
    for path, (_, report) in zip(args.compare, earlier, strict=True):
        check_comparable(settings, counts, report, path)
    warn_beyond_rope(choice, args.context_length, megatron_argv)
    return Preparation(settings, choice, documents, earlier)


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Name files by the fewest last parts of their paths that tell them apart.

    >>> distinct_names([Path("a/loss.json"), Path("b/loss.json")])
    ['a/loss', 'b/loss']
    >>> distinct_names([Path("a/before.json"), Path("b/loss.json")])
    ['before', 'loss']
    """
    whole = [path.resolve().with_suffix("").parts for path in paths]
    for number in range(1, max(map(len, whole), default=0)):
        names = ["/".join(parts[-number:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            return names
    return [str(path) for path in paths]


def choose_documents(
    args: argparse.Namespace, choice: ModelChoice
) -> tuple[list[HeldOutDocument], str]:
    """Give the rows to score, and a hash of where they come from."""
    if args.text is not None:
        tokenizer = open_tokenizer(args.tokenizer, choice.folder)
        rows = open_texts(args.text, tokenizer, args.context_length, args.max_documents_per_source)
        return rows, hash_texts(args.text, tokenizer.vocabulary_sha256, args.context_length)
    from megatron_long.dataset.manifest import read_manifest, verify_files

    if not args.dataset.is_dir():
        raise DataError(f"--dataset {args.dataset} is not a folder; give one of preprocess_mix.py")
    manifest = read_manifest(args.dataset)
    check_dataset_vocabulary(
        manifest.tokenizer.vocab_size,
        manifest.tokenizer.vocabulary_sha256,
        args.dataset,
        args.tokenizer,
        choice.folder,
    )
    verify_files(args.dataset, manifest, held_out_only=True)
    documents = select_documents(
        open_held_out(args.dataset, manifest),
        min_document_tokens=args.min_document_tokens,
        max_documents_per_source=args.max_documents_per_source,
    )
    return documents, manifest.fingerprint


def describe_settings(
    args: argparse.Namespace, megatron_argv: Sequence[str], choice: ModelChoice, fingerprint: str
) -> LossSettings:
    """Give what is measured, so that reports can be compared, or refused."""
    length = args.context_length
    return LossSettings(
        checkpoint=str(choice.folder.path),
        iteration=choice.folder.iteration,
        dataset=str(args.dataset) if args.dataset else " ".join(map(str, args.text)),
        dataset_fingerprint=fingerprint,
        context_length=length,
        buckets=parse_buckets(args.buckets, length) if args.buckets else default_buckets(length),
        min_document_tokens=args.min_document_tokens,
        max_documents_per_source=args.max_documents_per_source,
        training_length=args.training_length,
        megatron_argv=tuple(megatron_argv),
        weights=choice.measured_weights(),
    )


def table_paths(output: Path) -> tuple[Path, Path]:
    """Where the CSV and the PNG of the table go."""
    return output.with_name(f"{output.stem}-table.csv"), output.with_name(
        f"{output.stem}-table.png"
    )


def publish(args: argparse.Namespace, report: LossReport, preparation: Preparation) -> None:
    """Write the files and print the table."""
    from megatron_long.evaluation.report.plots import plot_position_curves, save_figure

    written = [args.output]
    write_loss_report(args.output, report)
    baseline = preparation.earlier[0][1].loss if preparation.earlier else None
    if args.plot is not None:
        written.append(args.plot)
        plot_position_curves(args.plot, report.loss, baseline, training_length=args.training_length)
    print(format_table(report))
    if preparation.earlier:
        table = build_table([*preparation.earlier, (args.name, report)])
        print(f"\n{format_loss_table(table)}")
        csv_path, png_path = table_paths(args.output)
        write_loss_csv(csv_path, table)
        save_figure(table_figure(table), png_path)
        written += [csv_path, png_path]
    print("wrote", *written)


def main() -> None:
    """Parse, check, score, write."""
    args, megatron_argv = build_parser().parse_known_args()
    preparation = prepare(args, megatron_argv)

    from tqdm import tqdm

    scorer = open_model(
        preparation.choice,
        context_length=args.context_length,
        megatron_argv=megatron_argv,
        precision=args.precision,
    )
    with tqdm(
        total=-(-len(preparation.documents) // scorer.data_parallel_size),
        unit="document",
        disable=not scorer.is_writer,
        mininterval=1.0,
    ) as progress:
        loss = loss_by_position(
            scorer,
            preparation.documents,
            preparation.settings.buckets,
            micro_batch_size=args.micro_batch_size,
            on_scored=progress.update,
        )
    if scorer.is_writer:
        publish(args, LossReport(preparation.settings, loss), preparation)
    scorer.close()
