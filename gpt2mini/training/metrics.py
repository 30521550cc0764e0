"""What a run logs: a row of figures every few steps, in memory and in metrics.jsonl."""

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt2mini.files import without_infinities, write_text

logger = logging.getLogger(__name__)


class MetricsLog:
    """Rows in memory and, given a file, one JSON object a line in it."""

    def __init__(self, path: Path | None, from_step: int = 0) -> None:
        """from_step: keep the file's rows up to this step, from which the run is resumed."""
        self.path = path
        self.rows = rows_until(from_step, path) if path is not None else []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, "".join(map(as_line, self.rows)))
        self.began = time.perf_counter()

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Time spent inside does not count as training time."""
        entered = time.perf_counter()
        yield
        self.began += time.perf_counter() - entered

    def seconds(self) -> float:
        """Since the last call."""
        before, self.began = self.began, time.perf_counter()
        return self.began - before

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        logger.info("step %d: %s", row["step"], in_words(row))
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(as_line(row))


# the figures of a row that tell most, to be read while training goes on
SHOWN = ("loss", "validation_loss", "validation_accuracy", "reward", "kl")


def in_words(row: dict[str, Any]) -> str:
    """The figures that tell most, short enough for a line of 80 characters."""
    parts = [f"{name.replace('_', ' ')} {row[name]:.3f}" for name in SHOWN if name in row]
    if "learning_rate" in row:
        parts.append(f"lr {row['learning_rate']:.3g}")
    for name in row:
        if name.endswith("_per_second"):
            speed = f"{row[name]:,.0f}" if row[name] >= 100 else f"{row[name]:.3g}"
            parts.append(f"{speed} {name.removesuffix('_per_second')}/s")
    return ", ".join(parts)


def as_line(row: dict[str, Any]) -> str:
    return json.dumps(without_infinities(row), allow_nan=False) + "\n"


def rows_until(step: int, path: Path) -> list[dict[str, Any]]:
    """The rows of a log up to a step; a line that was cut off in writing ends it."""
    if step == 0 or not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            rows.append({k: math.nan if value is None else value for k, value in row.items()})
        except ValueError:
            break
    return [row for row in rows if row["step"] <= step]


class Figures:
    """Means of what a loss function computes besides the loss: rewards, accuracies.

    Add values in each batch; call it for their means since the last call.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, **values: Tensor) -> None:
        """Tensors of any shape, each element with the same weight. They are detached."""
        for name, value in values.items():
            # Kept as tensors: reading a value would synchronize with the device.
            self.sums[name] = self.sums.get(name, 0) + value.detach().float().sum()
            self.counts[name] = self.counts.get(name, 0) + value.numel()

    def __call__(self) -> dict[str, float]:
        means = {name: float(self.sums[name]) / n for name, n in self.counts.items() if n}
        self.sums, self.counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
