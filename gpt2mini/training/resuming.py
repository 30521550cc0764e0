"""Is a resumed run still the one that was started? Its data and settings, beside those of then."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from gpt2mini.checkpoints.origin import Samples, equal_up_to_rounding
from gpt2mini.device import best_precision
from gpt2mini.training.checkpoints import Progress
from gpt2mini.training.optimizers import parameter_groups
from gpt2mini.training.settings import Settings

logger = logging.getLogger(__name__)


def check_same_data(out: Path, own: dict[str, str], found: Progress) -> None:
    """Raise ValueError if the checkpoint is of a run on other batches. own: their fingerprint."""
    names = own.keys() | found.data.keys()
    differing = sorted(name for name in names if found.data.get(name) != own.get(name))
    if differing:
        raise ValueError(
            f"{out} was started with other data, another seed or another batch size (different: "
            f"{', '.join(differing)}), so its held-out data and its best model do not apply to "
            "this run: continue it with its own, or choose another folder"
        )


def check_same_base(out: Path, own: Samples, found: Progress) -> None:
    """Raise ValueError if frozen parameters are others than when the run was saved: what has been
    learned corrects those. own: see `samples_of_frozen`."""
    for name, here in own.items():
        there = found.frozen.get(name, here)
        if not equal_up_to_rounding(here, there, same_dtype=True):
            raise ValueError(
                f"{out} was started from another model: the frozen parameter {name} has the "
                f"values {here}, and had {there}. Load the model that the run began with"
            )


def warn_of_other_settings(out: Path, own: dict[str, Any], found: Progress) -> None:
    """The result is then not that of one run. A longer run, for example, has another learning rate
    at the same step. own: see `settings_at`."""
    differing = [
        f"{name} was {found.settings[name]} and is {value}"
        for name, value in own.items()
        if found.settings.get(name, value) != value
    ]
    if differing:
        logger.warning(
            "%s goes on with other settings, unlike one uninterrupted run: at step %d %s",
            *(out, found.step, "; ".join(differing)),
        )


def settings_at(
    step: int, settings: Settings, optimizers: Sequence[Optimizer], device: torch.device
) -> dict[str, Any]:
    """By name, what decides how much a step changes. step: counted from 1."""
    multiplier = settings.schedule(step - 1) if step else 0.0
    groups = parameter_groups(optimizers)
    rates = [float(group.get("peak_lr", group["lr"])) * multiplier for group in groups]
    decays = [group.get("weight_decay", 0.0) for group in groups]
    is_clipped = math.isfinite(settings.max_grad_norm)  # JSON has no infinity
    return {
        "the learning rate": " and ".join(dict.fromkeys(f"{rate:.3g}" for rate in rates)),
        "the weight decay": " and ".join(dict.fromkeys(f"{decay:g}" for decay in decays)),
        "accumulate": settings.accumulate,
        "max_grad_norm": settings.max_grad_norm if is_clipped else "inf",
        "precision": best_precision(device, settings.precision),
    }
