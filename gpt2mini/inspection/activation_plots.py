"""Plots of the residual stream, the logit lens and the change of weights, as PNG files.

matplotlib is optional: pip install 'gpt2mini[plots]'.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from gpt2mini.inspection.comparison_table import layer_of
from gpt2mini.inspection.drawing import (
    WIDEST,
    add_colorbar,
    drawable,
    new_figure,
    save,
    write_in_cells,
)
from gpt2mini.inspection.lens import escape

if TYPE_CHECKING:
    from gpt2mini.inspection.compare import ModelComparison
    from gpt2mini.inspection.lens import Lens
    from gpt2mini.inspection.tracing import Trace
    from gpt2mini.tokenizer import Tokenizer

MOST_POSITIONS = 64  # of a plot of the lens
POSITIONS_PER_ROW = 16  # of them, each as wide as a word


def token_labels(tokenizer: "Tokenizer", token_ids: Sequence[int]) -> list[str]:
    """Tokens as labels: a space as an open box, unprintable characters and parts of characters as
    escapes."""
    texts = [tokenizer.token_bytes(i).decode("utf-8", "backslashreplace") for i in token_ids]
    return [escape(text).removesuffix("\n").replace(" ", "\u2423") for text in texts]


# ---- the residual stream


def plot_trace(activations: "Trace", picture: str | Path, title: str) -> None:
    """The length (Euclidean norm) of what every block's attention and MLP add and of the residual
    stream, as a PNG: the median of the tokens, and the first token, whose vector is often far
    longer. activations: with attn_out, mlp_out and stream of each block, and the embedding."""
    lengths = {
        part: np.stack([x.float().norm(dim=2)[0].cpu() for x in activations.of_each_block(part)])
        for part in ("attn_out", "mlp_out", "stream")
    }  # (layers, tokens) each
    embedding = activations["embedding"].float().norm(dim=2)[:1].cpu().numpy()  # (1, tokens)
    lengths["stream"] = np.concatenate([embedding, lengths["stream"]])
    panels = {"first token": lambda x: x[:, 0]}
    if embedding.shape[1] > 1:
        panels = {"median of the other tokens": lambda x: np.median(x[:, 1:], axis=1)} | panels
    layers = len(lengths["attn_out"])
    width = min(WIDEST / 2, max(4.5, 1.5 + 0.26 * layers))
    figure, all_axes = new_figure(width * len(panels), 4.2, len(panels))
    for (name, of_tokens), axes in zip(panels.items(), np.atleast_1d(all_axes), strict=True):
        for part, label, marker, color in (
            ("stream", "residual stream", "o", "black"),
            ("attn_out", "attention adds", "s", "0.4"),
            ("mlp_out", "MLP adds", "^", "0.55"),
        ):
            values = of_tokens(lengths[part])
            places = range(layers - len(values), layers)  # the embedding before block 0
            axes.plot(places, values, label=label, marker=marker, markersize=4, color=color)
        label_blocks(axes, layers)
        axes.set(title=name, ylabel="length of the vector (log scale)", yscale="log")
        axes.grid(alpha=0.3)
    limits = [axes.get_ylim() for axes in np.atleast_1d(all_axes)]
    for axes in np.atleast_1d(all_axes):
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    np.atleast_1d(all_axes)[0].legend(fontsize=8)
    figure.suptitle(title)
    save(figure, picture)


def label_blocks(axes: Any, layers: int) -> None:
    """The embedding, and blocks by number, below an axis."""
    blocks = range(0, layers, max(1, math.ceil(layers / 24)))
    axes.set_xticks([-1, *blocks], ["embedding", *map(str, blocks)], fontsize=8)
    axes.get_xticklabels()[0].set(rotation=45, ha="right")
    axes.set_xlabel("block")


# ---- the logit lens


def plot_lens(
    lens: "Lens", tokenizer: "Tokenizer", token_ids: Tensor, picture: str | Path, title: str
) -> None:
    """The most likely next token after each layer (upwards) at each position (to the right), darker
    for a higher probability, as a PNG; of a long text, at its last 64 positions. Where it is the
    token that follows in the text the cell has a thick outline. token_ids: the row that the lens
    was made of. Raises ImportError as `plot_losses`."""
    row = token_ids.flatten().tolist()
    first = max(0, len(row) - MOST_POSITIONS)
    if first:
        title += f" (the last {len(row) - first} of {len(row)} tokens)"
    per_row = min(len(row) - first, POSITIONS_PER_ROW)
    starts = range(first, len(row), per_row)
    height = 1.3 + 0.28 * len(lens.layers)
    width = min(WIDEST, max(6.0, 2.2 + 0.7 * per_row))
    figure, panels = new_figure(width, 0.5 + height * len(starts), rows=len(starts))
    panels = np.atleast_1d(panels)
    for axes, start in zip(panels, starts, strict=True):
        positions = range(start, min(start + per_row, len(row)))
        image = draw_lens(axes, lens, tokenizer, row, positions)
        axes.set_xlim(-0.5, per_row - 0.5)
    add_colorbar(figure, image, list(panels), "probability of the token shown")
    figure.suptitle(f"{title}\nthick outline: the token that follows in the text", fontsize=10)
    save(figure, picture)


def draw_lens(
    axes: Any, lens: "Lens", tokenizer: "Tokenizer", row: Sequence[int], positions: range
) -> Any:
    """Some positions of the row; the image, for a colorbar."""
    at = slice(positions.start, positions.stop)
    ids = lens.token_ids[:, 0, at, 0].tolist()  # (layers, positions)
    probabilities = lens.probabilities[:, 0, at, 0].numpy()
    image = axes.imshow(probabilities, cmap="Greys", vmin=0, vmax=1, aspect="auto", origin="lower")
    texts = [[drawable(text, 9) for text in token_labels(tokenizer, of_layer)] for of_layer in ids]
    write_in_cells(axes, image, texts)
    following = [row[i + 1] if i + 1 < len(row) else None for i in positions]
    for layer, of_layer in enumerate(ids):
        for place, (shown, true) in enumerate(zip(of_layer, following, strict=True)):
            if shown == true:
                outline_cell(axes, layer, place)
    read = [drawable(text, 12) for text in token_labels(tokenizer, row[at])]
    axes.set_xticks(range(len(read)), read, fontsize=8, rotation=45, parse_math=False)
    axes.set_yticks(range(len(ids)), map(layer_of, lens.layers), fontsize=8)
    axes.set(xlabel="input token", ylabel="residual stream after")
    return image


def outline_cell(axes: Any, row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    corner = (column - 0.45, row - 0.44)
    axes.add_patch(Rectangle(corner, 0.9, 0.88, fill=False, edgecolor="#d1242f", linewidth=2))


# ---- two models


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
    save(figure, picture)
