"""Draw the measured ratios as one picture, from the tables of this folder's README.

    python tests/benchmarks/ratios.py            # writes tests/benchmarks/ratios.png

A row is drawn if its figure is set in bold. Nothing is measured here: the rows of the README are,
each by the command beside it.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
INK, GRID, AHEAD, BEHIND = "#222222", "#dddddd", "#2a6f97", "#b5651d"


@dataclass(frozen=True)
class Ratio:
    """A measured row. factor: how many times as good ours is as the peer's."""

    figure: str
    peer: str
    factor: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--readme", type=Path, default=FOLDER / "README.md")
    parser.add_argument("--out", type=Path, default=FOLDER / "ratios.png")
    args = parser.parse_args()
    ratios = measured_ratios(args.readme.read_text(encoding="utf-8"))
    draw(ratios, args.out)
    print(f"{len(ratios)} ratios: {args.out}")


def measured_ratios(readme: str) -> list[Ratio]:
    """The bold rows of all tables that have the columns `peer` and `ratio`, in their order."""
    found = []
    columns: list[str] = []
    for line in readme.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            columns = []
        elif not columns:
            columns = cells
        elif {"peer", "ratio"} <= set(columns) and cells[0].startswith("**"):
            row = dict(zip(columns, cells, strict=True))
            factor = float(row["ratio"].removesuffix(" x"))
            found.append(Ratio(cells[0].replace("**", ""), peer_of(row), factor))
    return found


def peer_of(row: dict[str, str]) -> str:
    """The peer's name, without its own number at the end."""
    return re.sub(r"[\s:]+[\d.,]+( (s|ms|GB|MB))?$", "", row["peer"])


def draw(ratios: list[Ratio], path: Path) -> None:
    """Bars on a logarithmic axis, from 1 x, where both are alike."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = range(len(ratios))
    figure, axes = pyplot.subplots(figsize=(9.6, 0.9 + 0.34 * len(ratios)), layout="constrained")
    for row, ratio in zip(rows, ratios, strict=True):
        color = AHEAD if ratio.factor >= 1 else BEHIND
        axes.barh(row, ratio.factor - 1, left=1, height=0.62, color=color)
        label, place = f"{ratio.factor:.2f} x   {ratio.peer}", (max(ratio.factor, 1), row)
        axes.annotate(
            label, place, (5, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK
        )
    axes.set_yticks(rows, [ratio.figure for ratio in ratios], fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    most = max((ratio.factor for ratio in ratios), default=2)
    axes.set_xlim(
        min(0.7, *(ratio.factor for ratio in ratios)) * 0.95, most * 5
    )  # room for the names of the peers
    ticks = [2.0**power for power in range(10) if 2**power <= most * 1.5]
    axes.set_xticks(ticks, [f"{tick:g} x" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_title("gpt2mini beside its peers: how many times better", fontsize=10, loc="left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
