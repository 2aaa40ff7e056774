"""Figures of the evaluations: the needle heatmap and the loss by position.

Figures are made without pyplot, so nothing is kept between calls and no display is needed.
Matplotlib is imported inside functions: it takes a second that data tools need not pay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_long.evaluation.generation.sample_results import Estimate
from megatron_long.evaluation.loss.loss_report import format_tokens
from megatron_long.evaluation.loss.position_loss import PositionLoss
from megatron_long.evaluation.needle.needle_scores import NeedleResult
from megatron_long.evaluation.ruler.ruler_definitions import THRESHOLD_PERCENT
from megatron_long.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SOURCE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D1F")
"""Okabe and Ito's palette, told apart by colour-blind readers; its yellow darkened to be seen."""

SOURCE_MARKERS = "osD^vPX"
"""One shape a source as well, so that grey prints stay readable."""

EXACT_COLOURS = ("#D7301F", "#FEE08B", "#1A9850")
"""Red, yellow, green, of different lightness."""

FIRST_PLOTTED_POSITION = 8
"""Earlier losses are several nats higher and would flatten the rest of the curve."""

MAX_WRITTEN_CELLS = 140
"""Grids up to this size have their values written into the cells."""

MAX_LENGTH_TICKS = 20

MAX_HISTORY_COLUMNS = 5

LEAST_SPAN_NATS = 0.5
"""Range of colours for log-likelihoods: small differences are not blown up beyond it."""

RESOLUTION_DPI = 150


def plot_heatmap(
    path: Path,
    results: Sequence[NeedleResult],
    *,
    title: str = "Needle in a haystack",
    training_length: int | None = None,
    num_cells: int | None = None,
) -> None:
    """Write the needle heatmap as PNG; see `heatmap_figure`."""
    figure = heatmap_figure(
        results, title=title, training_length=training_length, num_cells=num_cells
    )
    save_figure(figure, path)


def plot_position_curves(
    path: Path,
    after: PositionLoss,
    before: PositionLoss | None = None,
    *,
    title: str = "Loss by position in the document",
    training_length: int | None = None,
) -> None:
    """Write the loss curves as PNG; see `position_figure`."""
    save_figure(position_figure(after, before, title=title, training_length=training_length), path)


def heatmap_figure(
    results: Sequence[NeedleResult],
    *,
    title: str,
    training_length: int | None = None,
    num_cells: int | None = None,
) -> Figure:
    """Draw context length by depth: whether the answer was exact, and how likely it was.

    The second panel is there for models that never give the whole answer: their likelihood still
    shows where the needle is seen. Sharing a context length and depth, cells show their mean.

    Args:
        results: Cells of the grid.
        training_length: Context the model was trained at, tokens: lengths beyond it are set off by
            a vertical line.
        num_cells: Cells of the whole grid, where it may be unfinished: the title then says so.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    if num_cells is not None and len(results) < num_cells:
        title = f"{title}: unfinished, {len(results)} of {num_cells} cells"
    lengths = sorted({result.context_length for result in results})
    width = min(18.0, max(8.0, 3.0 + 0.45 * len(lengths)))
    figure = Figure(figsize=(width, 8.5), layout="constrained")
    exact, likelihood = figure.subplots(2, 1)
    colours = LinearSegmentedColormap.from_list("exact", EXACT_COLOURS)
    grid = _grid(results, lambda result: float(result.is_exact))
    is_whole = np.isin(grid[~np.isnan(grid)], (0.0, 1.0)).all()  # not means of several cases
    _draw_grid(exact, grid, results, colours, (0.0, 1.0), "{:.0f}" if is_whole else "{:.2f}")
    share = np.mean([result.is_exact for result in results])
    exact.set_title(f"{title}\nanswer given exactly by greedy decoding: {share:.0%} of the cells")
    exact.images[0].colorbar.set_label("share answered exactly")
    grid = _grid(results, lambda result: result.log_likelihood)
    lowest, highest = float(np.nanmin(grid)), float(np.nanmax(grid))
    limits = (min(lowest, highest - LEAST_SPAN_NATS), highest)
    _draw_grid(likelihood, grid, results, "cividis", limits, "{:.2f}")
    mean = np.mean([result.log_likelihood for result in results])
    likelihood.set_title(f"log-likelihood of the answer: {mean:.2f} nats per token on average")
    likelihood.images[0].colorbar.set_label("log-likelihood (nats per token, 0 is certain)")
    if training_length is not None:
        exact.set_title(f"{exact.get_title()} (trained to {format_tokens(training_length)} tokens)")
        for axes in (exact, likelihood):
            _mark_column(axes, lengths, training_length)
    return figure


def needle_history_figure(history: Sequence[tuple[str, Sequence[NeedleResult]]]) -> Figure:
    """Draw how the heatmap filled during training: a panel a measurement, and the means below.

    Args:
        history: Label and results of each measurement, in order of training.
    Source: Fu et al. 2024, figure 3.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    columns = min(MAX_HISTORY_COLUMNS, len(history))
    num_rows = -(-len(history) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.5 * num_rows + 3.2), layout="constrained")
    parts = figure.add_gridspec(num_rows + 1, columns, height_ratios=[2.5] * num_rows + [3.0])
    panels = [figure.add_subplot(parts[divmod(i, columns)]) for i in range(len(history))]
    colours = LinearSegmentedColormap.from_list("exact", EXACT_COLOURS)
    shares, likelihoods = [], []
    for axes, (label, results) in zip(panels, history, strict=True):
        grid = _grid(results, lambda result: float(result.is_exact))
        axes.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        lengths = sorted({result.context_length for result in results})
        ends = sorted({0, len(lengths) - 1})
        axes.set_xticks(ends, [format_tokens(lengths[end]) for end in ends])
        axes.set_yticks([0, grid.shape[0] - 1], ["0%", "100%"])
        shares.append(float(np.mean([result.is_exact for result in results])))
        likelihoods.append(float(np.mean([result.log_likelihood for result in results])))
        axes.set_title(f"{label}: {shares[-1]:.0%}", fontsize=10)
        axes.set_xlabel("context length", fontsize=8)
        axes.set_ylabel("depth", fontsize=8)
    axes = figure.add_subplot(parts[num_rows, :])
    places = range(len(history))
    (exact,) = axes.plot(
        places, shares, "o-", color=SOURCE_COLOURS[2], label="answers given exactly"
    )
    axes.set(ylim=(-0.03, 1.03), ylabel="share of cells")
    axes.set_xticks(places, [label for label, _ in history], rotation=20, ha="right")
    twin = axes.twinx()
    (likely,) = twin.plot(
        places, likelihoods, "s--", color=SOURCE_COLOURS[0], label="log-likelihood of the answer"
    )
    twin.set_ylabel("nats per token")
    axes.legend(handles=[exact, likely], frameon=False, fontsize=9, loc="center right")
    axes.grid(alpha=0.25)
    return figure


def position_figure(
    after: PositionLoss,
    before: PositionLoss | None = None,
    *,
    title: str,
    training_length: int | None = None,
) -> Figure:
    """Draw loss against position, one line a source and a black one for all.

    Args:
        before: Another measurement of the same documents, dashed; adds a panel of the difference,
            over the cells that both can give.
        training_length: Context of the old model, tokens: a vertical line.
    """
    from matplotlib.figure import Figure

    num_panels = 1 if before is None else 2
    figure = Figure(figsize=(9.0, 4.8 * num_panels), layout="constrained")
    panels = figure.subplots(num_panels, 1, squeeze=False)[:, 0]
    panels[0].set_title(title)
    panels[0].set_ylabel("loss (nats per token)")
    _draw_curves(panels[0], after, after.curve)
    if before is not None:
        edges = sorted(set(after.edges) & set(before.edges))
        later, earlier = after.over(edges), before.over(edges)
        _draw_curves(panels[0], before, before.curve, is_before=True)
        panels[1].set_title("difference: after minus before (below 0 is better)")
        panels[1].set_ylabel("difference (nats per token)")
        _draw_curves(panels[1], later, lambda name: later.curve(name) - earlier.curve(name))
        panels[1].axhline(0.0, color="0.4", linewidth=1)
    for axes in panels:
        _dress_position_axis(axes, after.edges[-1], training_length)
    panels[0].legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, title="source", fontsize=9
    )
    return figure


def _draw_curves(
    axes: Axes,
    loss: PositionLoss,
    curve: Callable[[str | None], np.ndarray],
    *,
    is_before: bool = False,
) -> None:
    edges = np.array(loss.edges, dtype=np.float64)
    # Positions of a cell are its integers: the middle of edges 8 and 9 is position 8.
    centres = np.sqrt(np.maximum(edges[:-1], 0.5) * np.maximum(edges[1:] - 1, 0.5))
    is_shown = edges[:-1] >= min(FIRST_PLOTTED_POSITION, edges[-1] / 2)
    style: dict[str, Any] = {"linestyle": "--" if is_before else "-"}
    for place, source in enumerate(loss.loss_sums):
        axes.plot(
            centres[is_shown],
            curve(source)[is_shown],
            color=SOURCE_COLOURS[place % len(SOURCE_COLOURS)],
            marker=SOURCE_MARKERS[place % len(SOURCE_MARKERS)],
            markersize=0 if is_before else 3.5,
            linewidth=1.0 if is_before else 1.3,
            label=None if is_before else source,
            **style,
        )
    axes.plot(
        centres[is_shown],
        curve(None)[is_shown],
        color="black",
        linewidth=1.8 if is_before else 2.4,
        label="all, before (dashed)" if is_before else "all",
        **style,
    )


def _dress_position_axis(axes: Axes, context_length: int, training_length: int | None) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position in the document (tokens, log scale)")
    lowest = min(FIRST_PLOTTED_POSITION, context_length / 2)
    octaves = np.arange(np.ceil(np.log2(lowest)), np.floor(np.log2(context_length)) + 1)
    ticks = [int(2**octave) for octave in octaves]
    axes.set_xticks(ticks, [format_tokens(tick) for tick in ticks])
    axes.set_xlim(lowest, context_length)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if training_length is not None and training_length < context_length:
        axes.axvline(training_length, color="0.35", linestyle=":", linewidth=1.5)
        axes.annotate(
            f" old context: {format_tokens(training_length)}",
            (training_length, 0.98),
            xycoords=("data", "axes fraction"),
            verticalalignment="top",
            fontsize=9,
            color="0.25",
        )


def _grid(results: Sequence[NeedleResult], value: Callable[[NeedleResult], float]) -> np.ndarray:
    """Give the mean value of each cell [depths, lengths]; NaN where no case is."""
    lengths = sorted({result.context_length for result in results})
    depths = sorted({result.depth for result in results})
    sums = np.zeros((len(depths), len(lengths)))
    counts = np.zeros_like(sums)
    for result in results:
        place = depths.index(result.depth), lengths.index(result.context_length)
        sums[place] += value(result)
        counts[place] += 1
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _draw_grid(
    axes: Axes,
    grid: np.ndarray,
    results: Sequence[NeedleResult],
    colours: Any,
    limits: tuple[float, float],
    number: str,
) -> None:
    lengths = sorted({result.context_length for result in results})
    depths = sorted({result.depth for result in results})
    image = axes.imshow(
        grid, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest"
    )
    axes.figure.colorbar(image, ax=axes, pad=0.01)
    num_ticks = min(MAX_LENGTH_TICKS, len(lengths))
    columns = np.linspace(0, len(lengths) - 1, num_ticks).round().astype(int)
    is_round = all(length % 1024 == 0 for length in lengths)
    labels = [format_tokens(lengths[i]) if is_round else str(lengths[i]) for i in columns]
    axes.set_xticks(columns, labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}%" for depth in depths])
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("depth of the needle (0% is the start)")
    axes.set_xticks(np.arange(1, len(lengths)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(depths)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    if grid.size <= MAX_WRITTEN_CELLS:
        _write_values(axes, grid, image, number)


def _write_values(axes: Axes, grid: np.ndarray, image: Any, number: str) -> None:
    for (row, column), value in np.ndenumerate(grid):
        if np.isnan(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        colour = "white" if is_dark else "black"
        axes.text(
            column, row, number.format(value), ha="center", va="center", fontsize=8, color=colour
        )


def _mark_column(axes: Axes, lengths: Sequence[int], training_length: int) -> None:
    if lengths[0] <= training_length < lengths[-1]:
        column = sum(length <= training_length for length in lengths) - 0.5
        axes.axvline(column, color="black", linestyle="--", linewidth=2.5)


def ruler_figure(reports: Sequence[tuple[str, Mapping[int, Estimate]]]) -> Figure:
    """Draw averages over context length with their intervals, and RULER's threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for place, (name, averages) in enumerate(reports):
        known = [(length, cell) for length, cell in averages.items() if cell.mean is not None]
        figures = np.array([(cell.low, cell.mean, cell.high) for _, cell in known]).reshape(-1, 3)
        axes.errorbar(
            [length for length, _ in known],
            figures[:, 1],
            yerr=np.abs(figures[:, [0, 2]] - figures[:, 1:2]).T,
            capsize=3,
            label=name,
            color=SOURCE_COLOURS[place % len(SOURCE_COLOURS)],
            marker=SOURCE_MARKERS[place % len(SOURCE_MARKERS)],
        )
    axes.axhline(THRESHOLD_PERCENT, color="#777", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    lengths = sorted({length for _, averages in reports for length in averages})
    axes.set_xticks(lengths, [format_tokens(length) for length in lengths])
    axes.set(xlabel="context length (tokens)", ylabel="average score (%)", ylim=(0, 103))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=RESOLUTION_DPI)
