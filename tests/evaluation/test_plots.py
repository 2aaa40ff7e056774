from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_long.evaluation.loss.position_loss import PositionLoss, cell_edges
from megatron_long.evaluation.needle.needle_scores import NeedleResult
from megatron_long.evaluation.report.plots import (
    heatmap_figure,
    needle_history_figure,
    plot_heatmap,
    plot_position_curves,
    position_figure,
)

SOURCES = ("CommonCrawl", "C4", "GitHub", "Wikipedia", "Book", "ArXiv", "StackExchange")
PNG = b"\x89PNG\r\n\x1a\n"


def make_results(num_lengths: int, num_depths: int, reach: int) -> list[NeedleResult]:
    """Give a model that finds the needle when it is at most `reach` tokens from the end."""
    return [
        NeedleResult(
            context_length=int(length),
            depth=float(depth),
            actual_depth=float(depth),
            needle_start=int(depth * length),
            is_exact=bool(length * (1 - depth) < reach),
            token_accuracy=1.0,
            log_likelihood=-float(length * (1 - depth) / 20_000) - 0.05,
        )
        for length in np.linspace(1024, 131072, num_lengths).astype(int)
        for depth in np.linspace(0, 1, num_depths)
    ]


def make_loss(context_length: int, decay_until: int, seed: int) -> PositionLoss:
    """Give losses that fall with the position up to a length and rise beyond it."""
    rng = np.random.default_rng(seed)
    loss = PositionLoss(cell_edges(context_length))
    positions = np.arange(1, context_length + 1)
    shape = 3.5 * positions**-0.06 + 0.3 * np.log2(np.maximum(positions / decay_until, 1))
    for place, source in enumerate(SOURCES):
        noise = rng.normal(scale=0.5, size=context_length)
        loss.add(source, shape - 0.2 * place + noise, np.ones(context_length))
    return loss


def test_heatmap_shows_each_cell_at_its_place():
    results = make_results(8, 5, 30_000)
    figure = heatmap_figure(results, title="Needle", training_length=81920)
    exact, likelihood = figure.axes[:2]
    grid = exact.images[0].get_array()
    assert grid.shape == (5, 8)
    for place, result in enumerate(results):
        column, row = divmod(place, 5)
        assert grid[row, column] == result.is_exact
        assert likelihood.images[0].get_array()[row, column] == result.log_likelihood
    assert exact.images[0].get_clim() == (0.0, 1.0)
    assert [label.get_text() for label in exact.get_yticklabels()] == [
        "0%", "25%", "50%", "75%", "100%",
    ]  # fmt: skip
    assert exact.get_xticklabels()[0].get_text() == "1024"
    assert exact.get_xticklabels()[-1].get_text() == "131072"
    for axes in (exact, likelihood):
        assert axes.get_xlabel() == "context length (tokens)"
        assert axes.get_ylabel() == "depth of the needle (0% is the start)"
        assert [line.get_xdata()[0] for line in axes.lines] == [4.5]
    share = np.mean([result.is_exact for result in results])
    assert f"{share:.0%}" in exact.get_title()
    assert "trained to 80K tokens" in exact.get_title()


def test_likelihoods_of_a_weak_model_are_told_apart_but_not_blown_up():
    results = make_results(8, 5, 0)
    low, high = heatmap_figure(results, title="Needle").axes[1].images[0].get_clim()
    likelihoods = [result.log_likelihood for result in results]
    assert (low, high) == (min(likelihoods), max(likelihoods))
    alike = [replace(result, log_likelihood=-5.2) for result in results]
    low, high = heatmap_figure(alike, title="Needle").axes[1].images[0].get_clim()
    assert (low, high) == (-5.7, -5.2)


def test_an_unfinished_grid_says_so():
    results = make_results(8, 5, 30_000)
    title = heatmap_figure(results[:5], title="Needle", num_cells=40).axes[0].get_title()
    assert "unfinished, 5 of 40 cells" in title
    title = heatmap_figure(results, title="Needle", num_cells=40).axes[0].get_title()
    assert "unfinished" not in title


def test_red_is_a_miss_and_green_a_hit():
    figure = heatmap_figure(make_results(8, 5, 30_000), title="Needle")
    colours = figure.axes[0].images[0].cmap
    red, green = colours(0.0), colours(1.0)
    assert red[0] > 2 * red[1]
    assert green[1] > 2 * green[0]


def test_position_curves_have_labels_units_and_the_old_length():
    after, before = make_loss(2048, 2048, 1), make_loss(2048, 256, 2)
    figure = position_figure(after, before, title="Loss", training_length=256)
    losses, differences = figure.axes
    assert losses.get_ylabel() == "loss (nats per token)"
    assert differences.get_ylabel() == "difference (nats per token)"
    names = [text.get_text() for text in losses.get_legend().get_texts()]
    assert names == [*SOURCES, "all", "all, before (dashed)"]
    assert len(losses.lines) == 2 * 8 + 1  # and the old context
    for axes in figure.axes:
        assert axes.get_xlabel() == "position in the document (tokens, log scale)"
        assert axes.get_xlim() == (8, 2048)
        assert 256 in [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]
    drawn = {line.get_label(): line.get_ydata() for line in differences.lines}
    expected = after.curve() - before.curve()
    np.testing.assert_allclose(drawn["all"], expected[-len(drawn["all"]) :])
    assert drawn["all"][-1] < -0.5


def test_the_difference_is_drawn_over_common_cells():
    """Against a longer curve with other edges: both are summed again over what they share."""
    after = PositionLoss((0, 8, 16, 32))
    after.add("Book", np.full(32, 2.0), np.ones(32))
    before = PositionLoss((0, 4, 8, 12, 32, 64))
    before.add("Book", np.repeat([3.0, 4.0, 9.0], [8, 24, 32]), np.ones(64))
    drawn = position_figure(after, before, title="Loss").axes[1].lines[0].get_ydata()
    np.testing.assert_allclose(drawn, [-2.0])  # 8-32; cells before position 8 are not drawn


def test_without_an_earlier_measurement_there_is_one_panel():
    figure = position_figure(make_loss(64, 64, 1), title="Loss")
    assert len(figure.axes) == 1
    assert len(figure.axes[0].get_legend().get_texts()) == 8


@pytest.mark.parametrize("context_length", [2, 16, 131072])
def test_any_context_length_can_be_drawn(tmp_path: Path, context_length):
    path = tmp_path / "new" / "loss.png"
    plot_position_curves(path, make_loss(context_length, 64, 1), training_length=64)
    assert path.read_bytes().startswith(PNG)
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize("grid", [(1, 1), (40, 10)])
def test_any_grid_can_be_drawn(tmp_path: Path, grid):
    path = tmp_path / "needle.png"
    plot_heatmap(path, make_results(*grid, 50_000), training_length=81920)
    assert path.read_bytes().startswith(PNG)
    assert path.stat().st_size > 10_000
    assert list(tmp_path.iterdir()) == [path]


def test_means_of_several_seeds_are_written_as_means_and_missing_cells_stay_blank():
    results = [
        replace(result, seed=seed, is_exact=seed == 0)
        for seed in range(3)
        for result in make_results(4, 3, 0)
    ]
    left = [result for result in results if result.context_length < 131072 or result.depth < 1]
    exact = heatmap_figure(left, title="Needle").axes[0]
    written = [text.get_text() for text in exact.texts]
    assert written == ["0.33"] * 11
    assert np.ma.is_masked(exact.images[0].get_array()[2, 3])
    single = heatmap_figure(make_results(4, 3, 30_000), title="Needle").axes[0]
    assert {text.get_text() for text in single.texts} == {"0", "1"}


def test_history_has_a_panel_a_measurement_and_the_means():
    reaches = (0, 20_000, 50_000, 80_000, 110_000, 140_000)
    history = [(f"{i}B tokens", make_results(8, 5, reach)) for i, reach in enumerate(reaches)]
    figure = needle_history_figure(history)
    *panels, means, likelihood = figure.axes
    assert len(panels) == 6
    shares = [np.mean([result.is_exact for result in results]) for _, results in history]
    assert [panel.get_title() for panel in panels] == [
        f"{label}: {share:.0%}" for (label, _), share in zip(history, shares, strict=True)
    ]
    assert means.lines[0].get_ydata() == pytest.approx(shares)
    assert [label.get_text() for label in means.get_xticklabels()] == [
        label for label, _ in history
    ]
    assert likelihood.lines[0].get_ydata()[0] == pytest.approx(
        np.mean([result.log_likelihood for result in history[0][1]])
    )
    assert len(needle_history_figure(history[:1]).axes) == 3
