"""Training in several processes: each reads other batches, and their gradients are averaged.

Every process holds the whole model (DDP: Li et al. 2020, "PyTorch Distributed"), or a part of it
(`gpt2mini.training.sharding`). Either way the gradients that arrive are the mean over the processes
of each one's sum, which `divide_and_clip` turns into the mean over all targets.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt2mini.training.distributed import get_rank, get_world_size


class LossOfModel(nn.Module):
    """Model and loss as one module, since DDP follows what happens inside one `forward`."""

    def __init__(self, model: nn.Module, loss_function: Callable) -> None:
        super().__init__()
        self.model, self.loss_function = model, loss_function

    def forward(self, batch: Any) -> tuple[Tensor, Tensor | int]:
        return self.loss_function(self.model, batch)


def with_averaged_gradients(model: nn.Module, loss_function: Callable) -> nn.Module:
    """batch -> (sum, count), whose backward also averages the gradients over the processes."""
    loss = LossOfModel(model, loss_function)
    if get_world_size() == 1:
        return loss
    # else all processes would drop the same activations
    torch.manual_seed(torch.initial_seed() + get_rank())
    if is_sharded(model):
        return loss
    return DistributedDataParallel(loss)


def gradient_sync(loss: nn.Module, now: bool) -> AbstractContextManager:
    """Whether backward inside is to average the gradients: only that of a step's last micro-batch
    needs to, since the others' pile up first."""
    if isinstance(loss, DistributedDataParallel):
        return nullcontext() if now else loss.no_sync()
    if isinstance(loss, LossOfModel) and is_sharded(loss.model):
        loss.model.set_requires_gradient_sync(now)  # type: ignore[operator]
    return nullcontext()


def is_sharded(model: nn.Module) -> bool:
    """Whether `sharding.shard` has spread the model over the processes."""
    return hasattr(model, "whole_model")


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or what its parts in all processes make together."""
    # only a DTensor has this; its class takes a second to import
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def spread_like(like: Tensor, whole: Tensor) -> Tensor:
    """The reverse: a tensor that every process has whole, spread over them as `like` is."""
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh  # type: ignore[attr-defined]
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements)  # type: ignore[attr-defined]
