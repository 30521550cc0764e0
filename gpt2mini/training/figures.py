"""Means of what a loss function sees besides the loss: rewards, accuracies, a clip fraction."""

from typing import Any

from torch import Tensor


class Figures:
    """Add values as they come; call it for their means since the last call."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, **values: Tensor) -> None:
        """Values of any number, each counting alike; no gradient is kept of them."""
        for name, value in values.items():
            # They stay tensors: to read one would wait for the device.
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
