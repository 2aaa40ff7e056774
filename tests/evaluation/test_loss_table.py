import csv
from pathlib import Path

import numpy as np
import pytest

from megatron_long.evaluation.loss.loss_report import LossReport
from megatron_long.evaluation.loss.loss_table import (
    build_table,
    format_loss_table,
    table_figure,
    write_loss_csv,
)
from megatron_long.evaluation.loss.position_loss import PositionLoss, cell_edges
from megatron_long.evaluation.report.plots import save_figure

from .test_loss_report import SETTINGS


def make_report(book_far: float, c4_near: float = 3.0) -> LossReport:
    """Two sources; C4 has no document beyond the near bucket."""
    loss = PositionLoss(cell_edges(16, SETTINGS.buckets))
    loss.add("Book", np.array([2.0] * 4 + [book_far] * 12), np.ones(16))
    loss.add("C4", np.full(3, c4_near), np.ones(3))
    return LossReport(SETTINGS, loss)


@pytest.fixture
def table():
    reports = [
        ("original", make_report(1.0)),
        ("cut", make_report(1.009)),
        ("long", make_report(0.5, 3.011)),
    ]
    return build_table(reports)


def test_differences_beyond_a_hundredth_are_significant(table):
    assert table.names == ("original", "cut", "long")
    assert table.sources == ("Book", "C4", "all")
    near, far = 0, 1
    assert table.difference(far, 1, 0) == pytest.approx(0.009)
    assert not table.is_significant(far, 1, 0)
    assert table.difference(far, 2, 0) == -0.5
    assert table.is_significant(far, 2, 0)
    assert table.is_significant(near, 2, 1)
    assert not table.is_significant(near, 1, 1)
    expected_all = (3 * 0.011) / 7  # by tokens: four of Book, three of C4
    assert table.difference(near, 2, 2) == pytest.approx(expected_all)


def test_text(table):
    lines = [line.split() for line in format_loss_table(table).splitlines()]
    assert lines[1] == ["Book", "C4", "all"]
    assert lines[2] == ["0-4", "tokens"]
    assert lines[3] == ["original", "2.0000", "3.0000", "2.4286"]
    assert lines[5] == ["long", "+0.0000", "+0.0110*", "+0.0047"]
    assert lines[8] == ["cut", "+0.0090", "-", "+0.0090"]
    assert lines[9] == ["long", "-0.5000*", "-", "-0.5000*"]


def test_csv(table, tmp_path: Path):
    write_loss_csv(tmp_path / "t.csv", table)
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 + 3 * 2  # far from the start C4 has nothing
    last = rows[-2]
    assert last["positions"] == "4-16"
    assert (last["model"], last["source"]) == ("long", "Book")
    assert (float(last["loss_nats"]), float(last["difference_nats"])) == (0.5, -0.5)
    assert last["is_significant"] == "true"


def test_figure_colours_what_is_significant(table, tmp_path: Path):
    from matplotlib.colors import to_hex

    figure = table_figure(table)
    cells = figure.axes[0].tables[0].get_celld()
    colour = {place: to_hex(cell.get_facecolor()) for place, cell in cells.items()}
    assert cells[8, 1].get_text().get_text() == "-0.5000*"
    assert colour[8, 1] == "#c7e9c0"
    assert colour[4, 2] == "#fcbba1"
    assert colour[3, 1] == colour[7, 1] == "#ffffff"
    save_figure(figure, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 5000
