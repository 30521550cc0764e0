"""Pictures of a run. matplotlib is optional: pip install 'gpt2mini[plots]'."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """An empty figure and its axes, drawn without a screen and without global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'gpt2mini[plots]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def plot_confusion(confusion: np.ndarray, class_names: Sequence[str], picture: str | Path) -> None:
    """A confusion matrix, rows the truth, as a PNG. Raises ImportError as `plot_losses`."""
    size = max(4.0, 1.5 + 0.8 * len(class_names))
    figure, axes = new_figure(size, size)
    axes.imshow(confusion, cmap="Greys", vmin=0)
    ticks = range(len(class_names))
    axes.set_xticks(ticks, class_names, rotation=45, ha="right")
    axes.set_yticks(ticks, class_names)
    axes.set(xlabel="predicted", ylabel="truth")
    for row in ticks:
        for column in ticks:
            dark = confusion[row, column] > confusion.max() / 2
            number = str(confusion[row, column])
            axes.text(column, row, number, ha="center", va="center", color="w" if dark else "k")
    figure.savefig(picture, dpi=120)


def plot_losses(
    metrics: str | Path, picture: str | Path, title: str, unit: str = "nats per token"
) -> None:
    """Training and validation loss over the steps, from a run's metrics.jsonl into a PNG.

    Raises ImportError, saying what to install, where matplotlib is missing.
    """
    figure, axes = new_figure(7, 4)
    lines = Path(metrics).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for name, label, style in (
        ("loss", "training", {"color": "0.55", "linewidth": 1.2}),
        ("validation_loss", "validation (held out)", {"color": "black", "marker": "o"}),
    ):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), label=label, **style) if points else None
    axes.set(title=title, xlabel="step", ylabel=f"loss ({unit})")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
