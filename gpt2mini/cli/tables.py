"""What a training job shows of its figures: a line a row while it trains, a table at the end."""

import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from gpt2mini.training.distributed import get_rank

SHOWN_ROWS, SHOWN_VALIDATIONS = 12, 24  # in a table, at most
WIDTH = (
    80  # columns of characters of a table, at most: in a wider terminal too, as tables are copied
)


class AboveTheBar(logging.Handler):
    """Prints to the standard output without breaking the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


@contextmanager
def rows_in_terminal() -> Iterator[None]:
    """Inside, each row that training logs is printed, on rank 0."""
    log, handler = logging.getLogger("gpt2mini.training.metrics"), AboveTheBar(logging.INFO)
    level = log.level
    if get_rank() == 0:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def print_rows(rows: Sequence[dict[str, Any]], names: Sequence[str], where: str = "") -> None:
    """Tables of some figures by step, as many columns side by side as fit in 80 characters and in
    the terminal; without those that no row has.

    where: only the steps that have this figure. Of many steps some are shown, those with a
    validation loss first of all.
    """
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        steps[row["step"]] = steps.get(row["step"], {}) | row
    asked = [where] if where else names
    found = [row for row in steps.values() if any(name in row for name in asked)]
    validated = [row for row in found if "validation_loss" in row]
    others = [row for row in found if "validation_loss" not in row]
    shown = thinned(validated, SHOWN_VALIDATIONS) + thinned(others, SHOWN_ROWS)
    shown.sort(key=lambda row: row["step"])
    step = column("step", shown, decimals=0)
    logged = [name for name in names if any(name in row for row in shown)]
    for columns in side_by_side([column(name, shown) for name in logged], len(step[0])):
        print()
        for texts in zip(step, *columns, strict=True):
            print("  ".join(texts).rstrip())
    print()


def thinned(rows: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """About n of the rows, and the last."""
    return [*rows[: -1 : math.ceil(len(rows) / n)], rows[-1]] if rows else []


def column(name: str, rows: Sequence[dict[str, Any]], decimals: int | None = None) -> list[str]:
    """The name above the values, all with as many decimals, or in scientific notation if one is
    huge; blank where a row has none."""
    values = [row.get(name) for row in rows]
    largest = max((abs(value) for value in values if value and math.isfinite(value)), default=0.0)
    if decimals is None:
        decimals = 4 if largest < 100 else 2 if largest < 10_000 else 0
    form = f".{decimals}f" if largest < 1e9 else ".3e"
    texts = [name, *("" if value is None else format(value, form) for value in values)]
    width = max(5, *map(len, texts))
    return [text.rjust(width) for text in texts]


def side_by_side(columns: Sequence[list[str]], step_width: int) -> Iterator[list[list[str]]]:
    """Groups of columns that fit beside the steps."""
    room = min(WIDTH, shutil.get_terminal_size().columns) - step_width
    group: list[list[str]] = []
    for one in columns:
        if group and sum(2 + len(other[0]) for other in [*group, one]) > room:
            yield group
            group = []
        group.append(one)
    yield group
