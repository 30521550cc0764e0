"""Plots of training runs and of what they have learned, as PNG files.

matplotlib is optional: pip install 'gpt2mini[plots]'.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2mini.classification.report import shortened
from gpt2mini.inspection.drawing import (
    add_colorbar,
    draw_curve,
    drawable,
    new_figure,
    save,
    set_step_axis,
    write_in_cells,
)

if TYPE_CHECKING:
    from gpt2mini.preferences.reward_model import CalibrationBin

MARKERS, DASHES, GRAYS = "os^Dv", ("-", "--", ":", "-."), ("black", "0.4", "0.55")


def read_metrics(metrics: str | Path) -> list[dict[str, Any]]:
    lines = Path(metrics).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def curve(rows: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a metric in the rows that have it; null, which JSON has for NaN, is NaN
    again."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def plot_losses(
    metrics: str | Path, picture: str | Path, title: str, unit: str = "nats per token"
) -> None:
    """Training and validation loss over the steps, from a run's metrics.jsonl into a PNG. The
    lowest validation loss, whose model a run keeps, is marked.

    Raises ImportError, saying what to install, where matplotlib is missing.
    """
    figure, axes = new_figure(7, 4)
    rows = read_metrics(metrics)
    for name, label, style in (
        ("loss", "training", {"color": "0.55", "linewidth": 1.2}),
        ("validation_loss", "validation (held out)", {"color": "black", "marker": "o"}),
    ):
        steps, values = curve(rows, name)
        if len(steps):
            draw_curve(axes, steps, values, label=label, **style)
    mark_lowest(axes, *curve(rows, "validation_loss"))
    axes.set(title=title, ylabel=f"loss ({unit})")
    set_step_axis(axes)
    if axes.lines:
        axes.legend()
    save(figure, picture)


def mark_lowest(axes: Any, steps: np.ndarray, losses: np.ndarray) -> None:
    """A ring around the first of the lowest losses: the model in best/."""
    if not np.isfinite(losses).any():
        return
    kept = np.nanargmin(losses)
    label = f"kept in best/: step {steps[kept]:,.0f}, loss {losses[kept]:.3f}"
    ring = {"marker": "o", "markersize": 13, "markerfacecolor": "none", "linestyle": "none"}
    axes.plot(steps[kept], losses[kept], label=label, color="black", markeredgewidth=1.6, **ring)


def plot_figures(
    metrics: str | Path, names: Sequence[str], picture: str | Path, title: str
) -> None:
    """Metrics of a run, from its metrics.jsonl, over the steps, three per row, as a PNG. Raises
    ImportError as `plot_losses`."""
    logged = read_metrics(metrics)
    shown = [name for name in names if any(name in row for row in logged)]
    columns = max(1, min(3, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    figure, grid = new_figure(4 * columns, 0.4 + 2.8 * rows, columns, rows)
    panels = np.atleast_1d(grid).flatten()
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    for name, axes in zip(shown, panels, strict=False):
        draw_curve(axes, *curve(logged, name), color="black", linewidth=1.2)
        axes.set_title(name.replace("_", " "))
        set_step_axis(axes, ticks=4)
    figure.suptitle(title)
    save(figure, picture)


def plot_runs(
    runs: Mapping[str, str | Path],
    picture: str | Path,
    title: str,
    name: str = "loss",
    unit: str = "nats per token",
    average_every: int = 1,
) -> None:
    """One metric of several runs over the steps, as a PNG, with a dash pattern and marker for each.

    runs: label -> metrics.jsonl. average_every: from 2 on, the mean over so many logged steps is
    drawn over the raw curve. Raises ImportError as `plot_losses`.
    """
    if average_every < 1:
        raise ValueError(f"average_every must be at least 1, not {average_every}")
    figure, axes = new_figure(7, 4)
    for i, (label, metrics) in enumerate(runs.items()):
        steps, values = curve(read_metrics(metrics), name)
        if not len(steps):
            raise ValueError(f"{metrics} has no metric {name!r}")
        color = GRAYS[i % len(GRAYS)]
        if average_every > 1:
            axes.plot(steps, values, color=color, alpha=0.4, linewidth=0.6)
            steps, values = averaged(steps, average_every), averaged(values, average_every)
            label += f" (mean of {average_every})"
        style = {"linestyle": DASHES[i % len(DASHES)], "marker": MARKERS[i % len(MARKERS)]}
        every = 1 if np.isnan(values).any() else max(1, len(steps) // 10)
        axes.plot(steps, values, label=label, color=color, markevery=every, markersize=4, **style)
    axes.set(title=title, ylabel=f"{name.replace('_', ' ')} ({unit})")
    set_step_axis(axes)
    if axes.lines:
        axes.legend()
    save(figure, picture)


def averaged(values: np.ndarray, n: int) -> np.ndarray:
    """The mean of every n consecutive values; the last mean may be of fewer."""
    return np.array([values[i : i + n].mean() for i in range(0, len(values), n)])


def plot_calibration(bins: "Sequence[CalibrationBin]", picture: str | Path) -> None:
    """The accuracy of a reward model over its confidence (`reward_model.calibration`), with 95 %
    intervals, as a PNG; on the diagonal it is calibrated. Raises ImportError as `plot_losses`."""
    figure, axes = new_figure(5, 5)
    axes.plot([0.5, 1], [0.5, 1], color="0.55", linestyle="--", label="perfectly calibrated")
    confidence, correct = [one.confidence for one in bins], [one.correct for one in bins]
    below = [one.correct - one.interval[0] for one in bins]
    above = [one.interval[1] - one.correct for one in bins]
    bars = {"linestyle": "none", "color": "black", "capsize": 3, "linewidth": 1}
    label = "95 % interval (Wilson)"
    axes.errorbar(confidence, correct, np.abs([below, above]), label=label, **bars)
    most = max((one.pairs for one in bins), default=1)
    areas = [20 + 200 * one.pairs / most for one in bins]
    axes.scatter(confidence, correct, areas, color="black", label="pairs (area: their number)")
    axes.set(xlabel="confidence (predicted probability)", ylabel="accuracy")
    axes.set(xlim=(0.48, 1.02), ylim=(-0.04, 1.04))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    save(figure, picture)


# ---- confusion


def plot_confusion(confusion: np.ndarray, class_names: Sequence[str], picture: str | Path) -> None:
    """A confusion matrix, rows the truth, as a PNG: shaded by the share of the row, with the count
    in each cell that has room for it. Raises ImportError as `plot_losses`."""
    n, longest = len(class_names), min(24, max(map(len, class_names)))
    cell = min(0.8, 9.5 / n)  # inches
    side = max(2.4, cell * n) + 1 + 0.07 * longest
    figure, axes = new_figure(side + 1.2, side)
    shares = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    image = axes.imshow(shares, cmap="Greys", vmin=0, vmax=1)
    every = math.ceil(0.1 / cell)  # inches that a label takes
    size, ticks = max(6.0, min(10.0, 60 * cell)), range(0, n, every)
    names = [drawable(shortened(class_names[i])) for i in ticks]
    axes.set_xticks(ticks, names, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(ticks, names, fontsize=size, parse_math=False)
    axes.set(xlabel="predicted", ylabel="truth")
    digits = max(3, len(str(confusion.max())))
    fontsize = min(10.0, 72 * cell / (0.75 * digits))
    if fontsize >= 5:
        write_in_cells(axes, image, cell_numbers(confusion, shares, cell >= 0.6), fontsize)
    add_colorbar(figure, image, axes, "share of the texts of a row's class")
    save(figure, picture)


def cell_numbers(confusion: np.ndarray, shares: np.ndarray, show_shares: bool) -> list[list[str]]:
    """The counts, and below them, if there is room, their share of the row."""
    return [
        [
            f"{count}\n{share:.0%}" if show_shares and count else str(count)
            for count, share in zip(*row, strict=True)
        ]
        for row in zip(confusion.tolist(), shares.tolist(), strict=True)
    ]
