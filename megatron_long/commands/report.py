"""Make one HTML page of a run: mixture, loss curves, throughput, needle heatmaps, loss table, RULER.

The page holds its figures, so it opens from a file without a server or a network. Everything is found
in the folder by what the files hold; nothing there is changed.

    python tools/report.py ckpt/128k --dataset data/mix
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_long.cli import tool_parser
from megatron_long.evaluation.input_checks import check_output


def build_parser() -> argparse.ArgumentParser:
    """Give the parser."""
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("run_dir", type=Path, help="folder of --save, or one around it")
    add("--dataset", type=Path, help="folder of the mixture (default: what run.json names)")
    add("--baseline", type=Path, help="loss JSON to compare with (default: the first one found)")
    add("--output", type=Path, help="HTML file to write (default: RUN_DIR/report.html)")
    add("--force", action="store_true", help="replace a file that exists")
    return parser


def main() -> None:
    """Parse, collect, write."""
    args = build_parser().parse_args()
    output = args.output or args.run_dir / "report.html"
    check_output(output, force=args.force, flag="--output")
    from megatron_long.evaluation.report.run_files import collect
    from megatron_long.evaluation.report.run_report import write_run_report

    found = collect(args.run_dir, args.dataset, args.baseline)
    write_run_report(output, found)
    counts = {
        "training curves": len(found.curves),
        "needle reports": len(found.needles),
        "loss reports": len(found.losses),
        "RULER reports": len(found.rulers),
    }
    print(", ".join(f"{number} {name}" for name, number in counts.items()))
    for reason in found.left_out:
        print(f"left out: {reason}")
    print("wrote", output)
