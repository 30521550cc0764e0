"""Progressive depth: a run that begins with a shallow model and makes it deep on the way.

A block costs as much in the first step as in the last, but early in training a few blocks learn
nearly as much from each token as all of them. So most steps can be made with few (Gong et al. 2019,
"Efficient Training of BERT by Progressively Stacking"; Bu 2025, "Deep Progressive Training", arXiv
2511.04981, who grows once, late, and before the learning rate falls). What it gave here is in
weights/gpt2-nano/LAB.md.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gpt2mini.files import local_path
from gpt2mini.losses.steps import LossFunction, next_token_step
from gpt2mini.model import GPT2
from gpt2mini.surgery import grow_depth
from gpt2mini.training.checkpoints import RunCheckpoints, layers_of, read_on_all_ranks
from gpt2mini.training.distributed import is_sharded
from gpt2mini.training.loop import train
from gpt2mini.training.metrics import logger
from gpt2mini.training.settings import Settings


def train_growing(
    model: GPT2,
    batches: Iterable[Any],
    optimizers: Iterable[Optimizer],
    settings: Settings,
    loss_function: LossFunction = next_token_step,
    *,
    n_layers: int,
    grow_step: int,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    **others: Any,
) -> list[dict[str, Any]]:
    """`train`, but after step `grow_step` the model is grown, in place, to `n_layers` blocks.

    The optimizers go on with the averages that they have, and train the new blocks as those that
    they were copied from. Log, data and schedule are those of one run, which can be stopped and
    resumed at any step. `settings.patience` counts the evaluations of the grown model alone. The
    other arguments, and what is returned and raised, are those of `train`; besides, ValueError for
    a sharded model, a step that is not one of the run's, and a depth to which the model cannot
    grow.
    """
    if not 1 <= grow_step < settings.steps:
        raise ValueError(f"grow_step must lie in 1 to {settings.steps - 1}, not {grow_step}")
    if is_sharded(model):
        raise ValueError("a sharded model cannot grow: train it without --shard (DDP)")
    grow_depth(deepcopy(model), n_layers)  # what cannot grow is refused before the first step
    optimizers, out = list(optimizers), local_path(out)
    checkpoints = RunCheckpoints(out / "checkpoints", settings.keep_last)
    if resume and layers_of(checkpoints) == n_layers:
        grow(model, optimizers, n_layers)
    else:
        shallow = replace(
            settings, steps=grow_step, patience=0, save_every=settings.save_every or grow_step
        )
        arguments = (model, batches, optimizers, shallow, loss_function)
        train(*arguments, out=out, resume=resume, overwrite=overwrite, **others)
        grow_saved(checkpoints, model, optimizers, n_layers)
    arguments = (model, batches, optimizers, settings, loss_function)
    return train(*arguments, out=out, resume=True, **others)


def grow(model: GPT2, optimizers: Iterable[Optimizer], n_layers: int) -> None:
    """Grow the model, and let each optimizer train the copies of the blocks that it trains."""
    old = list(model.trf_blocks)
    grow_depth(model, n_layers)
    copies = n_layers // len(old)
    twins: dict[nn.Parameter, list[nn.Parameter]] = {}
    for i, block in enumerate(model.trf_blocks):
        if i % copies:
            source = old[i // copies].parameters()
            for parameter, twin in zip(source, block.parameters(), strict=True):
                twins.setdefault(parameter, []).append(twin)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] += [twin for p in group["params"] for twin in twins.get(p, [])]


def grow_saved(
    checkpoints: RunCheckpoints, model: GPT2, optimizers: list[Optimizer], n_layers: int
) -> None:
    """Grow the model, and put it in place of the checkpoint that was just written of it.

    Evaluations of the shallow model say nothing of what the deep one can still learn: patience
    counts anew.
    """
    found = read_on_all_ranks(checkpoints.all()[0], model)
    assert found is not None  # `train` has just written or read it
    logger.info("step %d: the model grows to %d blocks", found[0].step, n_layers)
    grow(model, optimizers, n_layers)
    found[0].evaluations_since_best = 0
    checkpoints.save(model, optimizers, *found)
