"""Convert a model between a Hugging Face folder (or a GGUF file) and a Megatron checkpoint.

    python tools/convert_checkpoint.py hf-to-megatron --input HF_DIR --output MEGATRON_DIR
    python tools/convert_checkpoint.py megatron-to-hf --input MEGATRON_DIR --output HF_DIR
    python tools/convert_checkpoint.py gguf-to-hf --input MODEL.gguf --output HF_DIR

Families: Llama 2 and 3, Mistral, Qwen2, SmolLM2 (docs/conversion.md). Without `--iteration` the latest
one is converted. Layouts of tensor, pipeline, context and data parallelism do not matter: the checkpoint
loads in, and is read from, any.
"""

import argparse
from dataclasses import fields
from pathlib import Path

from megatron_long.checkpoint.choosing import SKIP_HASH_CHECK
from megatron_long.checkpoint.megatron_folder import WEIGHTS
from megatron_long.cli import length_tokens, tool_parser
from megatron_long.conversion.checks import DTYPES, KEEP
from megatron_long.conversion.convert import hf_to_megatron
from megatron_long.conversion.export import gguf_to_hf, megatron_to_hf
from megatron_long.conversion.options import MAX_SHARD_BYTES, ConversionReport, Options
from megatron_long.conversion.stretch import Stretch
from megatron_long.freed_memory import keep_tensor_memory
from megatron_long.job.unwinding import unwound_by_signals


def build_parser() -> argparse.ArgumentParser:
    """Give the parser of this tool's flags."""
    parser = tool_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    importer = commands.add_parser("hf-to-megatron", help="Hugging Face or GGUF -> checkpoint")
    exporter = commands.add_parser("megatron-to-hf", help="checkpoint -> Hugging Face folder")
    unpacker = commands.add_parser("gguf-to-hf", help="GGUF file -> Hugging Face folder")
    importer.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pickled weights (.bin) where there are no safetensors, as tensors alone",
    )
    _add_stretch(importer, "to train with (default: the model's own)")
    _add_stretch(exporter, "that must have been trained with; another is an error")
    exporter.add_argument("--iteration", type=int, help="which iteration (default: the latest)")
    exporter.add_argument(
        "--hf-config",
        type=Path,
        help="model folder whose config.json to take instead of the checkpoint's hf_config.json",
    )
    exporter.add_argument(
        "--weights",
        choices=WEIGHTS,
        default=WEIGHTS[0],
        help="the model's, the optimizer's main copy, or the latter where FP8 rounded the former, as "
        "evaluation takes them (default: %(default)s)",
    )
    exporter.add_argument(
        SKIP_HASH_CHECK,
        action="store_true",
        help="do not compare the checkpoint's files with its hashes.json first",
    )
    for command in (exporter, unpacker):
        command.add_argument(
            "--max-shard-size-gb",
            type=float,
            default=MAX_SHARD_BYTES / 1e9,
            help="largest safetensors file, in 10^9 bytes (default: %(default)g)",
        )
    read = {
        importer: "model folder or GGUF file",
        exporter: "folder of checkpoints",
        unpacker: "GGUF file",
    }
    for command, what in read.items():
        _add_common(command, what)
    return parser


def _add_stretch(parser: argparse.ArgumentParser, purpose: str) -> None:
    group = parser.add_argument_group("RoPE and context", purpose)
    group.add_argument("--rope-theta", type=float, help="base")
    group.add_argument("--rope-method", choices=("base", "linear", "yarn", "llama3"), help="method")
    group.add_argument("--rope-factor", type=float, help="stretch of linear, yarn or llama3")
    group.add_argument(
        "--rope-original-length", type=length_tokens, help="tokens trained on before the stretch"
    )
    group.add_argument(
        "--context-length", type=length_tokens, help="longest context, in tokens: 131072 or 128K"
    )


def _add_common(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--input", type=Path, required=True, help=f"{what} to read")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=KEEP, help="type to store (default: the input's)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the output back, compare every bit, write the tensors' hashes, and compare the "
        "logits of Megatron and transformers",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument("--dry-run", action="store_true", help="check the input and write nothing")


def convert(args: argparse.Namespace) -> ConversionReport:
    """Run the conversion that the flags ask for, under a progress bar."""
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc=args.command, delay=0.5, disable=args.dry_run) as bar:
        options = Options(
            dtype=args.dtype,
            verify=args.verify,
            check_logits=args.verify,
            force=args.force,
            dry_run=args.dry_run,
            allow_pickle=getattr(args, "allow_pickle", False),
            check_hashes=not getattr(args, "skip_hash_check", False),
            max_shard_bytes=int(getattr(args, "max_shard_size_gb", 5) * 1e9),
            progress=bar.update,
        )
        if args.command == "gguf-to-hf":
            return gguf_to_hf(args.input, args.output, options=options)
        stretch = Stretch(**{field.name: getattr(args, field.name) for field in fields(Stretch)})
        if args.command == "hf-to-megatron":
            return hf_to_megatron(args.input, args.output, stretch=stretch, options=options)
        return megatron_to_hf(
            args.input,
            args.output,
            iteration=args.iteration,
            hf_config=args.hf_config,
            weights=args.weights,
            stretch=stretch,
            options=options,
        )


def main() -> None:
    """Parse, convert, print."""
    keep_tensor_memory()
    args = build_parser().parse_args()
    with unwound_by_signals():
        report = convert(args)
    print(report.describe(is_dry_run=args.dry_run))
