"""Compare what transformers and Megatron make of the stretched model: needle cells, loss of a long text.

    python -m examples.smollm2_128k.check_export results/export

Both compute in BF16 with kernels of their own, so that figures are near, not the same; status 1 if a needle
is found by the one alone, or a figure is farther off than BF16 explains.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_long.cli import run_tool, tool_parser
from megatron_long.evaluation.loss_report import read_loss_report
from megatron_long.evaluation.needle_report import NeedleReport, read_needle_report
from megatron_long.files import atomic_path

MAX_CELL_DIFFERENCE = 0.05
"""Nats per answer token."""
MAX_LOSS_DIFFERENCE = 0.01
"""Nats per token, mean over the text."""


@dataclass(frozen=True)
class Cell:
    """One needle, scored by Megatron and by transformers."""

    task: str
    context_length: int
    depth: float
    exact: tuple[bool, bool]
    log_likelihood: tuple[float, float]

    @property
    def difference(self) -> float:
        """Nats per answer token."""
        return abs(self.log_likelihood[0] - self.log_likelihood[1])


def compare_cells(megatron: NeedleReport, hf: NeedleReport) -> list[Cell]:
    """Give each cell with both scores."""
    others = {result.key: result for result in hf.results}
    pairs = [(result, others[result.key]) for result in megatron.results]
    return [
        Cell(
            a.task,
            a.context_length,
            a.depth,
            (a.is_exact, b.is_exact),
            (a.log_likelihood, b.log_likelihood),
        )
        for a, b in pairs
    ]


def main() -> int:
    """Read, compare, write check.json."""
    parser = tool_parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder with needle, needle-hf, loss, loss-hf")
    folder: Path = parser.parse_args().folder
    reports = [
        read_needle_report(folder / name / "needle.json") for name in ("needle", "needle-hf")
    ]
    cells = compare_cells(*reports)
    losses = {}
    for name in ("loss", "loss-hf"):
        loss = read_loss_report(folder / f"{name}.json").loss
        losses[name] = loss.mean(0, loss.edges[-1])
    farthest = max(cell.difference for cell in cells)
    agree = all(cell.exact[0] == cell.exact[1] for cell in cells)
    difference = abs(losses["loss"] - losses["loss-hf"])
    passed = agree and farthest <= MAX_CELL_DIFFERENCE and difference <= MAX_LOSS_DIFFERENCE
    found = {
        "cells": [asdict(cell) for cell in cells],
        "loss": losses["loss"],
        "loss_transformers": losses["loss-hf"],
        "largest_cell_difference": farthest,
        "passed": passed,
    }
    with atomic_path(folder / "check.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    for cell in cells:
        print(cell)
    print(
        f"loss {losses['loss']:.5f} in Megatron, {losses['loss-hf']:.5f} in transformers; cells differ by "
        f"at most {farthest:.4f} nats: {'PASS' if passed else 'FAIL'}"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(run_tool(main))
