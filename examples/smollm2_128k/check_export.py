"""Compare the stretched model in transformers and Megatron: needle cells, loss of a long text.

    python -m examples.smollm2_128k.check_export results/export

Both compute in FP32; status 1 if only one of them finds a needle, or a figure differs by more than FP32
explains. Cells that transformers scored in the run's precision, BF16 on GPUs, are shown next to the run's own
without a check: each uses its own kernels, whose rounding grows with the length.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_long.cli import run_tool, tool_parser
from megatron_long.errors import ConfigError
from megatron_long.evaluation.loss.loss_report import read_loss_report
from megatron_long.evaluation.needle.needle_report import NeedleReport, read_needle_report
from megatron_long.files import atomic_path

MAX_CELL_DIFFERENCE = 0.002
"""Nats per answer token."""
MAX_LOSS_DIFFERENCE = 0.0002
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
    """Return each cell that both scored, with both scores."""
    others = {result.key: result for result in hf.results}
    pairs = [(result, others[result.key]) for result in megatron.results if result.key in others]
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
    parser.add_argument(
        "folder", type=Path, help="folder with needle, needle-hf, needle-hf-run, loss, loss-hf"
    )
    folder: Path = parser.parse_args().folder
    reports = [
        read_needle_report(folder / name / "needle.json") for name in ("needle", "needle-hf")
    ]
    cells = compare_cells(*reports)
    if len(cells) < len(reports[0].results):
        raise ConfigError(f"{folder}/needle and needle-hf hold other cells; measure both again")
    as_measured = _cells_as_measured(folder)
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
        "cells_as_measured": [asdict(cell) for cell in as_measured],
        "passed": passed,
    }
    with atomic_path(folder / "check.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    for name, shown in (("FP32", cells), ("as the run was measured", as_measured)):
        for cell in shown:
            print(f"{name}: {cell}")
    print(
        f"loss {losses['loss']:.5f} in Megatron, {losses['loss-hf']:.5f} in transformers; cells differ by "
        f"at most {farthest:.4f} nats: {'PASS' if passed else 'FAIL'}"
    )
    return 0 if passed else 1


def _cells_as_measured(folder: Path) -> list[Cell]:
    """Cells of the run's own grid that transformers scored at the same precision."""
    paths = (folder.parent / "after" / "needle", folder / "needle-hf-run")
    if not all((path / "needle.json").is_file() for path in paths):
        return []
    return compare_cells(*(read_needle_report(path / "needle.json") for path in paths))


if __name__ == "__main__":
    sys.exit(run_tool(main))
