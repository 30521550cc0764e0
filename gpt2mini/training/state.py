"""What a run needs to go on: weights, optimizer states, step, random number generators."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gpt2mini.files import write_aside


def save_state(
    path: Path, model: nn.Module, optimizers: Iterable[Optimizer], step: int, best: float
) -> None:
    """Write the state aside and rename it: a crash leaves the old file or the new one."""
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "best": best,
        "torch_rng": torch.get_rng_state(),
    }
    write_aside(path, lambda aside: torch.save(state, aside))


def load_state(path: Path, model: nn.Module, optimizers: Iterable[Optimizer]) -> tuple[int, float]:
    """Fill model and optimizers in place; return (steps done, best validation loss)."""
    state = read_state(path)
    model.load_state_dict(state["model"])
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    torch.set_rng_state(state["torch_rng"])
    return state["step"], state["best"]


def saved_step(path: str | Path) -> int:
    """How many steps the run whose state stands at `path` has done."""
    return read_state(Path(path))["step"]


def read_state(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no saved state to resume from: {path} does not exist")
    return torch.load(path, map_location="cpu", weights_only=True)
