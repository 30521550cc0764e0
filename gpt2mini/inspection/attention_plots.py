"""Plots of attention: the weights of a block, the scores of all heads, as PNG files.

matplotlib is optional: pip install 'gpt2mini[plots]'.
"""

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from gpt2mini.inspection.drawing import (
    DOTS_PER_INCH,
    WIDEST,
    add_colorbar,
    drawable,
    new_figure,
    save,
    write_in_cells,
)

if TYPE_CHECKING:
    from gpt2mini.inspection.heads import HeadScores

SHARES = (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)  # marks beside the square-root scale
LABEL = 0.115  # inches that a token's label takes along an axis


def square_root() -> Any:
    """A scale from 0 to 1 on which small shares are visible too: 1 % is a tenth of black."""
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, vmin=0, vmax=1)


def plot_attention(
    attention: Tensor,
    tokens: Sequence[str],
    picture: str | Path,
    title: str,
    layer: int | None = None,
) -> None:
    """Attention weights as a PNG, with a panel for each head, on a square-root scale.

    attention: (heads, tokens, tokens), one row of `trace`'s. layer: the block, for the names of the
    heads. Raises ImportError as `plot_losses`.
    """
    heads, n_tokens = len(attention), len(tokens)
    if attention.shape[1:] != (n_tokens, n_tokens):
        raise ValueError(
            f"expected attention of the shape (heads, {n_tokens}, {n_tokens}) for {n_tokens} "
            f"tokens, not {tuple(attention.shape)}"
        )
    columns = min(4, math.ceil(math.sqrt(heads)))
    rows = math.ceil(heads / columns)
    side = min((WIDEST - 1) / columns, 8.0, max(3.2, 1.2 + 0.19 * n_tokens))
    figure, panels = new_figure(side * columns + 1, side * rows + 0.5, columns, rows)
    panels = np.atleast_1d(panels).flatten()
    for axes in panels[heads:]:
        axes.set_axis_off()
    pooled, size = largest_of_cells(attention, most=int(DOTS_PER_INCH * (side - 1)))
    for head, axes in zip(range(heads), panels, strict=False):
        end = size * pooled.shape[1] - 0.5
        image = axes.imshow(
            pooled[head], cmap="Greys", norm=square_root(), extent=(-0.5, end, end, -0.5)
        )
        name = str(head) if layer is None else f"{layer}.{head}"
        axes.set_title(f"head {name}" if heads > 1 or layer is not None else "", fontsize=10)
        is_lowest, is_leftmost = head + columns >= heads, head % columns == 0
        label_tokens(axes.set_xticks, tokens, side - 0.6, is_lowest, rotation=90)
        label_tokens(axes.set_yticks, tokens, side - 0.6, is_leftmost)
        axes.set(xlabel="key" if is_lowest else "", ylabel="query" if is_leftmost else "")
    label = "attention weight (square-root scale)"
    if size > 1:
        label += f", the largest of {size} x {size}"
    add_colorbar(figure, image, list(panels), label).set_ticks(SHARES)
    figure.suptitle(title)
    save(figure, picture)


def largest_of_cells(attention: Tensor, most: int) -> tuple[np.ndarray, int]:
    """(the largest weight in each square of size x size, size), so that at most `most` squares lie
    along a side: a picture of more weights than pixels would lose the large ones."""
    size = math.ceil(attention.shape[1] / most)
    weights = attention.float().cpu()[None]  # (1, heads, tokens, tokens)
    return F.max_pool2d(weights, size, ceil_mode=True)[0].numpy(), size


def label_tokens(
    set_ticks: Any, tokens: Sequence[str], inches: float, shown: bool, **style: Any
) -> None:
    """Label the positions of an axis with their tokens: all, or as many as there is room for, with
    the number of the position; or mark them alone, where another panel has the labels."""
    every = max(1, math.ceil(len(tokens) * LABEL / inches))
    places = range(0, len(tokens), every)
    labels = [drawable(tokens[i], longest=12) for i in places]
    if every > 1:
        labels = [f"{i} {label}" for i, label in zip(places, labels, strict=True)]
    if shown:
        set_ticks(places, labels, fontsize=7, parse_math=False, **style)
    else:
        set_ticks(places, [""] * len(labels))


def plot_head_scores(scores: "HeadScores", picture: str | Path, title: str) -> None:
    """The scores of every head, a panel for each kind, on a square-root scale, as a PNG. Raises
    ImportError as `plot_losses`."""
    layers, heads = scores.induction.shape
    kinds = [field.name for field in fields(scores)]
    width, height = 1 + heads * min(0.5, 11.5 / heads), 1.1 + 0.3 * layers
    columns = max(1, min(len(kinds), int((WIDEST - 1) / width)))
    rows = math.ceil(len(kinds) / columns)
    figure, panels = new_figure(width * columns + 1, height * rows + 0.4, columns, rows)
    panels = np.atleast_1d(panels).flatten()
    for axes in panels[len(kinds) :]:
        axes.set_axis_off()
    for kind, axes in zip(kinds, panels, strict=False):
        of_heads = getattr(scores, kind).numpy()  # (layers, heads)
        image = axes.imshow(of_heads, cmap="Greys", norm=square_root(), aspect="auto")
        write_in_cells(axes, image, [[f"{score:.2f}" for score in row] for row in of_heads])
        axes.set_xticks(range(heads))
        axes.set_yticks(range(layers))
        axes.set(title=f"{kind.replace('_', '-')} score", xlabel="head", ylabel="block")
    add_colorbar(figure, image, list(panels), "score (square-root scale)").set_ticks(SHARES)
    figure.suptitle(title)
    save(figure, picture)
