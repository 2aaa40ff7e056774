"""Average the weights of several checkpoints of one model into a new checkpoint.

    megatron-long average --input runs/a/iter_0001000 runs/a/iter_0001200 runs/b --output ckpt/mean

The export of the average is the average of the exports. Evaluation, `--pretrained-checkpoint` and
`megatron-long convert megatron-to-hf` take the output.
"""

import argparse
from pathlib import Path

from megatron_long.checkpoint.choosing import SKIP_HASH_CHECK
from megatron_long.checkpoint.megatron_folder import WEIGHTS
from megatron_long.cli import tool_parser
from megatron_long.conversion.average import average_checkpoints
from megatron_long.conversion.checks import DTYPES, KEEP
from megatron_long.conversion.options import Options
from megatron_long.freed_memory import keep_tensor_memory
from megatron_long.job.unwinding import unwound_by_signals


def build_parser() -> argparse.ArgumentParser:
    """Give the parser of this tool's flags."""
    parser = tool_parser(__doc__)
    add = parser.add_argument
    several = (
        "two or more: folders of checkpoints (the newest is used), or single ones (iter_0001000)"
    )
    add("--input", type=Path, nargs="+", required=True, metavar="DIR", help=several)
    add("--output", type=Path, required=True, help="checkpoint folder to write")
    add("--dtype", choices=DTYPES, default=KEEP, help="type to store (default: the inputs')")
    kinds = "the model's, the optimizer's main copy, or the latter where FP8 rounded the former"
    add("--weights", choices=WEIGHTS, default=WEIGHTS[0], help=f"{kinds} (default: %(default)s)")
    unchecked = "do not compare the checkpoints' files with their hashes.json first"
    add(SKIP_HASH_CHECK, action="store_true", help=unchecked)
    add("--force", action="store_true", help="replace an existing output")
    add("--dry-run", action="store_true", help="check the inputs and write nothing")
    return parser


def main() -> None:
    """Parse, average, print."""
    from tqdm import tqdm

    keep_tensor_memory()
    args = build_parser().parse_args()
    with (
        unwound_by_signals(),
        tqdm(unit="B", unit_scale=True, desc="average", delay=0.5, disable=args.dry_run) as bar,
    ):
        options = Options(
            dtype=args.dtype,
            force=args.force,
            dry_run=args.dry_run,
            check_hashes=not args.skip_hash_check,
            progress=bar.update,
        )
        report = average_checkpoints(args.input, args.output, weights=args.weights, options=options)
    print(report.describe(is_dry_run=args.dry_run))
