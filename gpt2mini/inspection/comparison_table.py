"""Differences of two models as text, and one name for a block wherever it is shown."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpt2mini.inspection.compare import Difference

WIDTH = 80  # columns of characters of a table


def layer_of(name: str) -> str:
    """trf_blocks.3.attn.query.weight and blocks.3.attn_out -> block 3; else the module's name."""
    parts = name.split(".")
    return f"block {parts[1]}" if parts[0] in ("trf_blocks", "blocks") else parts[0]


def table(title: str, differences: "Sequence[Difference]", longest: int | None = None) -> str:
    """A line for each difference, NaN and then the largest relative change first, in 80 columns;
    without a column of ranks where there are none."""
    by_size = sorted(differences, key=lambda x: (not math.isnan(x.relative), -x.relative))
    order = by_size[:longest]
    columns = [
        ["relative", *in_one_format([x.relative for x in order])],
        ["mean|d|", *in_one_format([x.mean_absolute for x in order])],
        ["max|d|", *in_one_format([x.maximum for x in order])],
        ["std(d)", *in_one_format([x.standard_deviation for x in order])],
        ["cosine", *(f"{x.cosine:.5f}" for x in order)],
        ["distance", *in_one_format([x.distance for x in order])],
    ]
    ranks = [x.effective_rank for x in order]
    if any(rank is not None for rank in ranks):
        columns.append(["rank", *("" if rank is None else f"{rank:.1f}" for rank in ranks)])
    widths = [max(map(len, cells)) for cells in columns]
    room = WIDTH - sum(1 + width for width in widths)
    names = [title, *(shown_name(x.name, room) for x in order)]
    lines = []
    for name, *row in zip(names, *columns, strict=True):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(" ".join([name.ljust(max(map(len, names))), *cells]).rstrip())
    left_out = len(differences) - len(order)
    return "\n".join([*lines, f"... and {left_out} more"] if left_out else lines)


def in_one_format(values: Sequence[float]) -> list[str]:
    """The numbers of a column, at most 7 characters each: with three digits of the largest and one
    number of decimals; in scientific notation where that would show none of the smallest."""
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    if not sizes:
        return [f"{value:.1f}" for value in values]
    decimals = max(0, 2 - math.floor(math.log10(max(sizes))))
    if decimals > 5 or max(sizes) >= 1e6 or min(sizes) < 10.0**-decimals:
        return [f"{value:.1e}" for value in values]
    return [f"{value:.{decimals}f}" for value in values]


def shown_name(name: str, longest: int = WIDTH) -> str:
    """trf_blocks.3.attn.query.weight -> block 3 query.weight; blocks.3.attn_out -> block 3
    attn_out. Of a longer name the end."""
    layer = layer_of(name)
    if layer != name.partition(".")[0]:
        rest = name.split(".", 2)[2]
        name = f"{layer} {rest.removeprefix('attn.').removeprefix('mlp.')}"
    return name if len(name) <= longest else "\u2026" + name[1 - longest :]
