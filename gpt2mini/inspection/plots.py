"""Pictures of a run. matplotlib is optional: pip install 'gpt2mini[plots]'."""

import json
from pathlib import Path


def plot_losses(metrics: str | Path, picture: str | Path, title: str) -> None:
    """Training and validation loss over the steps, from a run's metrics.jsonl into a PNG.

    Raises ImportError, saying what to install, where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'gpt2mini[plots]'") from None
    lines = Path(metrics).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen and without global state
    axes = figure.subplots()
    for name, label, style in (
        ("loss", "training", {"color": "0.55", "linewidth": 1.2}),
        ("validation_loss", "validation (held out)", {"color": "black", "marker": "o"}),
    ):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), label=label, **style) if points else None
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
