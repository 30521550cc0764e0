"""The random numbers that a run may draw: Python's, NumPy's, torch's and the device's."""

import random
from typing import Any

import numpy as np
import torch


def generator_states() -> dict[str, Any]:
    """Where each of them stands, in types that a checkpoint may hold."""
    name, keys, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    elif torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_generators(states: dict[str, Any]) -> None:
    version, numbers, rest = states["python"]
    random.setstate((version, tuple(numbers), rest))
    name, keys, *others = states["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *others))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
