"""Plots of training runs and of activations, as PNG files.

matplotlib is optional: pip install 'gpt2mini[plots]'.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from gpt2mini.inspection.compare import ModelComparison
    from gpt2mini.inspection.heads import HeadScores
    from gpt2mini.inspection.lens import Lens
    from gpt2mini.preferences.reward_model import CalibrationBin
    from gpt2mini.tokenizer import Tokenizer


MOST_POSITIONS = 64  # of a plot, each as wide as a word


def new_figure(width: float, height: float, panels: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """An empty figure and its axes (an array, if there are several), drawn without a display and
    without pyplot's global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'gpt2mini[plots]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, panels)


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
    rows = read_metrics(metrics)
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
        points = [(row["step"], row[name]) for row in logged if name in row]
        axes.plot(*zip(*points, strict=True), color="black", linewidth=1.2)
        axes.set(title=name.replace("_", " "), xlabel="step")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)


def plot_calibration(bins: "Sequence[CalibrationBin]", picture: str | Path) -> None:
    """The accuracy of a reward model over its confidence (`reward_model.calibration`), as a PNG; on
    the diagonal it is calibrated. Raises ImportError as `plot_losses`."""
    figure, axes = new_figure(4.5, 4.5)
    axes.plot([0.5, 1], [0.5, 1], color="0.55", linestyle="--", label="perfectly calibrated")
    most = max(one.pairs for one in bins)
    axes.scatter(
        [one.confidence for one in bins],
        [one.correct for one in bins],
        s=[20 + 200 * one.pairs / most for one in bins],
        color="black",
        label="pairs (area: their number)",
    )
    axes.set(xlabel="confidence (predicted probability)", ylabel="accuracy")
    axes.set(xlim=(0.48, 1.02), ylim=(-0.04, 1.04))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(picture, dpi=120)


def read_metrics(metrics: str | Path) -> list[dict[str, Any]]:
    lines = Path(metrics).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


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
        points = [(row["step"], row[name]) for row in read_metrics(metrics) if name in row]
        if not points:
            raise ValueError(f"{metrics} has no metric {name!r}")
        steps, figures = np.array(points, dtype=float).T
        color = ("black", "0.4", "0.6")[i % 3]
        if average_every > 1:
            axes.plot(steps, figures, color=color, alpha=0.4, linewidth=0.6)
            steps, figures = averaged(steps, average_every), averaged(figures, average_every)
            label += f" (mean of {average_every})"
        style = {"linestyle": ("-", "--", ":", "-.")[i % 4], "marker": "os^Dv"[i % 5]}
        axes.plot(steps, figures, label=label, color=color, markevery=0.1, markersize=4, **style)
    axes.set(title=title, xlabel="step", ylabel=f"{name.replace('_', ' ')} ({unit})")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


def averaged(figures: np.ndarray, n: int) -> np.ndarray:
    """The mean of every n consecutive figures; the last mean may be of fewer."""
    return np.array([figures[i : i + n].mean() for i in range(0, len(figures), n)])


# ---- activations


def token_labels(tokenizer: "Tokenizer", token_ids: Sequence[int]) -> list[str]:
    """Tokens as labels: a space as an open box, unprintable characters and parts of characters as
    escapes."""
    from gpt2mini.inspection.lens import escape

    texts = [tokenizer.token_bytes(i).decode("utf-8", "backslashreplace") for i in token_ids]
    return [escape(text).removesuffix("\n").replace(" ", "\u2423") for text in texts]


def plot_attention(
    attention: "Tensor", tokens: Sequence[str], picture: str | Path, title: str
) -> None:
    """Attention weights as a PNG, with a panel for each head.

    attention: (heads, tokens, tokens), one row of `trace`'s. Raises ImportError as `plot_losses`.
    """
    heads, n_tokens = len(attention), len(tokens)
    if attention.shape[1:] != (n_tokens, n_tokens):
        raise ValueError(
            f"expected attention of the shape (heads, {n_tokens}, {n_tokens}) for {n_tokens} "
            f"tokens, not {tuple(attention.shape)}"
        )
    columns = min(4, math.ceil(math.sqrt(heads)))
    rows = math.ceil(heads / columns)
    side = min(8.0, max(3.2, 1.2 + 0.19 * n_tokens))
    figure, panels = new_figure(side * columns + 1, side * rows + 0.5, columns, rows)
    panels = np.atleast_1d(panels).flatten()
    for head, axes in enumerate(panels):
        if head >= heads:
            axes.set_axis_off()
            continue
        image = axes.imshow(attention[head].float().cpu().numpy(), cmap="Greys", vmin=0, vmax=1)
        axes.set_title(f"head {head}" if heads > 1 else "", fontsize=10)
        label_tokens(axes.set_xticks, tokens, rotation=90)
        label_tokens(axes.set_yticks, tokens)
        axes.set(xlabel="key position", ylabel="" if head % columns else "query position")
    figure.colorbar(image, ax=list(panels), label="attention weight", shrink=0.6)
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)


def label_tokens(set_ticks: Any, tokens: Sequence[str], **style: Any) -> None:
    """Label the positions of an axis: with tokens if there is room, else every eighth by number."""
    every = 1 if len(tokens) <= 72 else 8
    places = list(range(0, len(tokens), every))
    labels = [drawable(tokens[i]) if every == 1 else str(i) for i in places]
    set_ticks(places, labels, fontsize=7, parse_math=False, **style)


def drawable(text: str) -> str:
    """The text, with a box for each character that matplotlib's own font lacks, such as Chinese."""
    from matplotlib.font_manager import findfont, get_font

    glyphs = get_font(findfont("DejaVu Sans")).get_charmap()
    return "".join(c if ord(c) in glyphs else "\u25a1" for c in text)


def plot_lens(
    lens: "Lens", tokenizer: "Tokenizer", token_ids: "Tensor", picture: str | Path, title: str
) -> None:
    """The most likely next token after each layer (upwards) at each position (to the right), darker
    for a higher probability, as a PNG; of a long text, at its last 64 positions. token_ids: the row
    that the lens was made of. Raises ImportError as `plot_losses`."""
    ids = lens.token_ids[:, 0, -MOST_POSITIONS:, 0]  # (layers, positions)
    probabilities = lens.probabilities[:, 0, -MOST_POSITIONS:, 0].numpy()
    layers, n_tokens = ids.shape
    if n_tokens < token_ids.numel():
        title += f" (the last {n_tokens} of {token_ids.numel()} tokens)"
    figure, axes = new_figure(2 + 0.72 * n_tokens, 1.6 + 0.3 * layers)
    image = axes.imshow(probabilities, cmap="Greys", vmin=0, vmax=1, aspect="auto", origin="lower")
    for layer in range(layers):
        for place, text in enumerate(token_labels(tokenizer, ids[layer].tolist())):
            shown = drawable(text if len(text) <= 9 else text[:8] + "\u2026")
            color = "white" if probabilities[layer, place] > 0.6 else "black"
            style = {"ha": "center", "va": "center", "fontsize": 7, "parse_math": False}
            axes.text(place, layer, shown, color=color, **style)
    read = token_labels(tokenizer, token_ids.flatten()[-n_tokens:].tolist())
    axes.set_xticks(range(n_tokens), map(drawable, read), fontsize=8, rotation=45, parse_math=False)
    names = [name.removesuffix(".stream").replace("blocks.", "block ") for name in lens.layers]
    axes.set_yticks(range(layers), names, fontsize=8)
    axes.set(title=title, xlabel="input token", ylabel="residual stream after")
    figure.colorbar(image, label="probability of the token shown")
    figure.savefig(picture, dpi=120)


def plot_change(comparison: "ModelComparison", picture: str | Path, title: str) -> None:
    """The relative change of each layer's weights and, if activations were compared, of the stream
    after each block, as a PNG. Raises ImportError as `plot_losses`."""
    streams = [x for x in comparison.activations if x.name.endswith((".stream", "embedding"))]
    panels = {"weights": comparison.layers} | ({"residual stream": streams} if streams else {})
    height = 1.4 + 0.27 * max(map(len, panels.values()))
    figure, all_axes = new_figure(5 * len(panels), height, len(panels))
    for (what, differences), axes in zip(panels.items(), np.atleast_1d(all_axes), strict=True):
        finite = [100 * x.relative if math.isfinite(x.relative) else 0.0 for x in differences]
        bars = axes.barh([x.layer for x in differences], finite, color="0.6", edgecolor="black")
        labels = [f" {100 * x.relative:.2g}" for x in differences]
        axes.bar_label(bars, labels, fontsize=8)
        axes.margins(x=0.15)
        axes.locator_params(axis="x", nbins=6)
        axes.invert_yaxis()
        axes.set(title=what, xlabel="relative change |b - a| / |a| (%)")
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)


def plot_head_scores(scores: "HeadScores", picture: str | Path, title: str) -> None:
    """Previous-token and induction score of every head, as a PNG. Raises ImportError as
    `plot_losses`."""
    layers, heads = scores.induction.shape
    figure, panels = new_figure(2 * (1.6 + 0.55 * heads), 1.6 + 0.32 * layers, 2)
    named = {"previous token": scores.previous_token, "induction": scores.induction}
    for (name, of_heads), axes in zip(named.items(), panels, strict=True):
        image = axes.imshow(of_heads.numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto")
        for layer in range(layers):
            for head in range(heads):
                score = float(of_heads[layer, head])
                style = {"ha": "center", "va": "center", "fontsize": 7}
                axes.text(head, layer, f"{score:.2f}", color="w" if score > 0.6 else "k", **style)
        axes.set_xticks(range(heads))
        axes.set_yticks(range(layers))
        axes.set(title=name, xlabel="head", ylabel="layer")
    figure.colorbar(image, ax=list(panels), label="score")
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)
