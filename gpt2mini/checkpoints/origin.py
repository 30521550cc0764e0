"""Where a model was loaded from, and what the files said that the model itself does not hold.

Both are kept with a loaded model: its settings are written back when it is saved, and an adapter
that is trained on it names its base.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Samples = dict[str, list[float]]  # name of a parameter -> three of its values


@dataclass(frozen=True)
class Origin:
    """What is known about a model beside its config and its weights. All empty for a new one."""

    base: str | None = None  # the folder, or the repository on the Hub
    settings: dict[str, Any] = field(default_factory=dict)  # of config.json
    generation: dict[str, Any] = field(default_factory=dict)  # of generation_config.json
    samples: Samples = field(default_factory=dict)  # of the weights, as they were loaded


def remember_origin(model: nn.Module, origin: Origin) -> None:
    vars(model)["_origin"] = origin


def origin_of(model: nn.Module) -> Origin:
    return vars(model).get("_origin", Origin())


def first_middle_last(parameter: Tensor) -> list[float]:
    """Three values of a tensor, by which it is recognized."""
    flat = parameter.detach().flatten()
    return flat[[0, len(flat) // 2, -1]].tolist()


def equal_up_to_rounding(found: list[float], expected: list[float], same_dtype: bool) -> bool:
    """Whether values are equal, or become equal when either side is rounded to fewer bits."""
    a, b = torch.tensor(found), torch.tensor(expected)
    if not same_dtype:
        return torch.allclose(a, b, rtol=1e-2, atol=1e-6)
    # loaded in float32, after it had been saved in fewer bits
    roundings = [torch.float32, torch.float16, torch.bfloat16]
    return any(
        torch.equal(a, b.to(d).float()) or torch.equal(a.to(d).float(), b) for d in roundings
    )
