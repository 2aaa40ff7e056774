"""Draw the loss of the demo's two trainings from the files that `--loss-log` wrote."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_long.cli import run_tool
from megatron_long.errors import DataError
from megatron_long.files import atomic_path, refuse_overwrite

WINDOW = 10
"""Steps of the running mean."""


def read_losses(path: Path) -> np.ndarray:
    """Return the loss of each step, nats per token.

    Raises: DataError: the file is missing or holds no step.
    """
    if not path.is_file():
        raise DataError(f"{path} is not there; train with --loss-log {path}")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    if not records:
        raise DataError(f"{path} holds no training step; look at the log of that training")
    return np.array([record["lm loss"] for record in records])


def running_mean(losses: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Mean of the last `window` values at each step (of fewer at the start).

    >>> running_mean(np.array([2.0, 4.0, 6.0]), window=2).tolist()
    [2.0, 3.0, 5.0]
    """
    sums = np.cumsum(np.insert(losses, 0, 0.0))
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot(short: np.ndarray, long: np.ndarray, output: Path) -> None:
    """Draw both trainings one after the other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    start = 0
    for losses, label, colour in (
        (short, "short context", "#4477aa"),
        (long, "stretched context", "#cc6677"),
    ):
        steps = np.arange(start + 1, start + len(losses) + 1)
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, running_mean(losses), color=colour, linewidth=2, label=label)
        start += len(losses)
    axes.axvline(len(short) + 0.5, color="0.5", linestyle="--", linewidth=1)
    axes.set(xlabel="optimizer step", ylabel="training loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_path(output) as path:
        figure.savefig(path, dpi=150, format=output.suffix.removeprefix(".") or "png")
    plt.close(figure)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", type=Path, required=True, help="loss log of the first training")
    parser.add_argument("--long", type=Path, required=True, help="loss log of the stretch")
    parser.add_argument("--output", type=Path, required=True, help="figure to draw")
    parser.add_argument("--force", action="store_true", help="replace an existing --output")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    refuse_overwrite(args.output, force=args.force)
    plot(read_losses(args.short), read_losses(args.long), args.output)
    print(f"  figure: {args.output}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
