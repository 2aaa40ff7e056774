"""Convert a Llama between a Hugging Face folder and a Megatron checkpoint.

    python tools/convert_checkpoint.py hf-to-megatron --input HF_DIR --output MEGATRON_DIR
    python tools/convert_checkpoint.py megatron-to-hf --input MEGATRON_DIR --output HF_DIR

Without `--iteration` the latest one is converted. Tensor-, pipeline- and data-parallel layouts of
the checkpoint do not matter: it loads in, and is read from, any.
"""

import argparse
import sys
from pathlib import Path

from megatron_long.cli import run_tool
from megatron_long.conversion.checks import DTYPES, KEEP
from megatron_long.conversion.convert import (
    MAX_SHARD_BYTES,
    ConversionReport,
    hf_to_megatron,
    megatron_to_hf,
)


def make_parser() -> argparse.ArgumentParser:
    """Give the parser of this tool's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    importer = commands.add_parser("hf-to-megatron", help="Hugging Face folder -> checkpoint")
    exporter = commands.add_parser("megatron-to-hf", help="checkpoint -> Hugging Face folder")
    importer.add_argument(
        "--rope-theta", type=float, help="RoPE base to train with (default: the model's own)"
    )
    exporter.add_argument("--iteration", type=int, help="which iteration (default: the latest)")
    exporter.add_argument(
        "--hf-config",
        type=Path,
        help="model folder whose config.json to take if the checkpoint has no hf_config.json",
    )
    exporter.add_argument(
        "--max-shard-size-gb",
        type=float,
        default=MAX_SHARD_BYTES / 1e9,
        help="largest safetensors file, in 10^9 bytes (default: %(default)g)",
    )
    for command in (importer, exporter):
        command.add_argument("--input", type=Path, required=True, help="folder to read")
        command.add_argument("--output", type=Path, required=True, help="folder to write")
        command.add_argument(
            "--dtype", choices=DTYPES, default=KEEP, help="type to store (default: the input's)"
        )
        command.add_argument(
            "--verify", action="store_true", help="read the output back and compare every bit"
        )
        command.add_argument("--force", action="store_true", help="replace an existing output")
        command.add_argument(
            "--dry-run", action="store_true", help="check the input and write nothing"
        )
    return parser


def convert(args: argparse.Namespace) -> ConversionReport:
    """Run the conversion that the flags ask for, under a progress bar."""
    from tqdm import tqdm

    shared = {name: getattr(args, name) for name in ("dtype", "verify", "force", "dry_run")}
    with tqdm(unit="B", unit_scale=True, desc=args.command, disable=args.dry_run) as bar:
        if args.command == "hf-to-megatron":
            return hf_to_megatron(
                args.input, args.output, rotary_base=args.rope_theta, progress=bar.update, **shared
            )
        return megatron_to_hf(
            args.input,
            args.output,
            iteration=args.iteration,
            hf_config=args.hf_config,
            max_shard_bytes=int(args.max_shard_size_gb * 1e9),
            progress=bar.update,
            **shared,
        )


def describe(report: ConversionReport, *, is_dry_run: bool) -> str:
    """Say in one paragraph what was written."""
    verb = "would write" if is_dry_run else "wrote"
    verified = "; read back, every bit equal" if report.is_verified else ""
    return (
        f"{verb} {report.output}: {report.num_tensors} tensors, "
        f"{report.num_parameters / 1e6:,.1f} M parameters, {report.size_bytes / 1e9:,.3f} GB of "
        f"{report.dtype}, RoPE base {report.geometry.rotary_base:,.0f}, "
        f"up to {report.geometry.max_position_embeddings:,} tokens{verified}"
    )


def main() -> None:
    """Parse, convert, print."""
    args = make_parser().parse_args()
    print(describe(convert(args), is_dry_run=args.dry_run))


if __name__ == "__main__":
    sys.exit(run_tool(main))
