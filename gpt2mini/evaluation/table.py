"""A table of results, with those of the GPT-2 paper."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import Any

WIDTH = 80  # columns of characters of a table

SIZES = ("117M", "345M", "762M", "1542M")  # the paper's names of gpt2, -medium, -large and -xl

# Radford et al. 2019, table 3, for the four sizes; accuracies in percent.
PAPER = {
    "LAMBADA perplexity": (35.13, 15.60, 10.87, 8.63),
    "LAMBADA accuracy, filtered": (45.99, 55.48, 60.12, 63.24),
    "LAMBADA accuracy": (None, None, None, 52.66),  # section 3.3, without the stop-word filter
    "CBT-CN": (87.65, 92.35, 93.45, 93.30),
    "CBT-NE": (83.4, 87.1, 88.0, 89.05),
    "WikiText-2": (29.41, 22.76, 19.93, 18.34),
    "PTB": (65.85, 47.33, 40.31, 35.76),
    "enwik8": (1.16, 1.01, 0.97, 0.93),
    "text8": (1.17, 1.06, 1.02, 0.98),
    "WikiText-103": (37.50, 26.37, 22.05, 17.48),
    "1BW": (75.20, 55.72, 44.575, 42.16),
}


@dataclass(frozen=True)
class Options:
    """Settings for all tasks of a table."""

    context_length: int | None = None  # None: the model's context
    stride: int | None = None  # of sliding windows; None: rolling windows
    limit: int | None = None  # examples per task; thousands of characters of a long text
    batch_size: int = 8
    precision: str = "fp32"
    progress: bool = False


@dataclass(frozen=True)
class Row:
    """One result, how it was computed, and the paper's figures for the four sizes, if any."""

    task: str
    metric: str
    value: float
    count: int
    counted: str  # the unit of `count`
    setting: str
    paper: tuple[float | None, ...] | None = None


@dataclass(frozen=True)
class Table:
    """Rows, printed as a table; the columns of the paper where it has any of these figures."""

    rows: list[Row]

    def as_dicts(self) -> list[dict[str, Any]]:
        """Rows for JSON, with the paper's figures by size."""
        return [
            {
                **asdict(row),
                "paper": dict(zip(SIZES, row.paper, strict=True)) if row.paper else None,
            }
            for row in self.rows
        ]

    def __str__(self) -> str:
        """In 80 columns: a heading for each task and setting, and its figures below."""
        sizes = SIZES if any(row.paper for row in self.rows) else ()
        head = ["metric", "of", "ours", *sizes]
        cells = [head, *(as_cells(row, len(sizes)) for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
        first, *lines = [aligned(line, widths) for line in cells]
        shown, heading = [first], ""
        for row, line in zip(self.rows, lines, strict=True):
            if heading != f"{row.task}: {row.setting}":
                heading = f"{row.task}: {row.setting}"
                shown += ["", *wrap(heading, WIDTH, subsequent_indent="  ")]
            shown.append(line)
        return "\n".join(shown)


def aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """A line: the metric to the left, all others to the right."""
    metric, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    of, ours, *paper = others
    return " ".join([f"{metric.strip():<{widths[0]}} {of} ", ours, *paper]).rstrip()


def as_cells(row: Row, sizes: int) -> list[str]:
    """sizes: columns for the paper's figures."""
    figures = row.paper or [None] * sizes
    paper = ["-" if figure is None else f"{figure:.2f}" for figure in figures]
    return [row.metric, f"{row.count:,} {row.counted}", in_decimals(row.value), *paper]


def in_decimals(value: float) -> str:
    """With two decimals, and in at most 8 characters: in scientific notation if it is huge."""
    if math.isinf(value):  # per word, where a text has no spaces
        return "-"
    return f"{value:.2f}" if abs(value) < 10_000 else f"{value:.2e}"


def percent(hits: Sequence[bool]) -> float:
    return 100 * sum(hits) / len(hits)
