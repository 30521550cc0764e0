"""What all plots share: figures, axes of steps, text on any background.

matplotlib is optional: pip install 'gpt2mini[plots]'.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

DOTS_PER_INCH = 120
WIDEST = 1600 / DOTS_PER_INCH  # inches: a picture that fits on a screen
FEW_POINTS = 30  # of a curve: each is marked


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


def save(figure: Any, picture: str | Path) -> None:
    figure.savefig(picture, dpi=DOTS_PER_INCH)


# ---- curves


def draw_curve(axes: Any, steps: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """A line over the steps. Few points are marked, and those beside a missing one: a line needs
    two of them."""
    if len(steps) <= FEW_POINTS or np.isnan(values).any():
        style = {"marker": "o", "markersize": 4} | style
    axes.plot(steps, values, **style)


def set_step_axis(axes: Any, ticks: int = 6) -> None:
    """Whole steps below the curves, and a word where there is no curve."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    steps = [x for line in axes.lines for x in np.atleast_1d(line.get_xdata())]
    values = [y for line in axes.lines for y in np.atleast_1d(line.get_ydata())]
    if not np.isfinite(values).any():
        axes.text(0.5, 0.5, "no finite number was logged", ha="center", transform=axes.transAxes)
    if len(np.unique(steps)) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)


# ---- text and colors


def add_colorbar(figure: Any, image: Any, panels: Any, label: str) -> Any:
    """Beside the top of the panels, at most 6 inches high."""
    shrink = min(0.8, 6 / figure.get_figheight())
    return figure.colorbar(image, ax=panels, label=label, shrink=shrink, anchor=(0, 1))


def write_in_cells(
    axes: Any, image: Any, texts: Sequence[Sequence[str]], fontsize: float = 7
) -> None:
    """Text in each cell of an image, (rows, columns), black or white, whichever can be read."""
    colors = image.to_rgba(image.get_array()).tolist()  # (rows, columns, 4)
    style = {"ha": "center", "va": "center", "fontsize": fontsize, "parse_math": False}
    for row, of_row in enumerate(texts):
        for column, text in enumerate(of_row):
            axes.text(column, row, text, color=text_color(colors[row][column]), **style)


def text_color(background: Sequence[float]) -> str:
    """Black or white, whichever has the higher contrast: at least 4.58 : 1 on any color.

    The contrast of two luminances is (lighter + 0.05) / (darker + 0.05) (WCAG 2.2, section 1.4.3).
    """
    return "black" if luminance(background) > 0.179 else "white"


def luminance(color: Sequence[float]) -> float:
    """Relative luminance (WCAG 2.2) of a color given as red, green and blue from 0 to 1."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in color[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def drawable(text: str, longest: int = 24) -> str:
    """The text, cut to `longest` characters, with a box for each character that matplotlib's own
    font lacks, such as Chinese."""
    from matplotlib.font_manager import findfont, get_font

    glyphs = get_font(findfont("DejaVu Sans")).get_charmap()
    shown = text if len(text) <= longest else text[: longest - 1] + "\u2026"
    return "".join(c if ord(c) in glyphs else "\u25a1" for c in shown)
