"""Distributed training under torchrun: ranks, averaged gradients (DDP), sharded parameters (FSDP2).

Every rank reads other batches. With DDP (Li et al. 2020, "PyTorch Distributed") it holds the whole
model; with FSDP2 (Zhao et al. 2023, "PyTorch FSDP") a shard of each parameter. Either way the
gradients that arrive are the mean over the ranks of each rank's sum, which `divide_and_clip` turns
into the mean over all targets. Without torchrun the world size is 1 and all of this does nothing.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from gpt2mini.device import best_precision
from gpt2mini.model import GPT2


@contextmanager
def process_group() -> Iterator[None]:
    """Inside, the process is a rank of torchrun's process group, if torchrun has started it. Each
    rank has a GPU of its own, its device "cuda", or the ranks share the CPU."""
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    # before there is a group, or its functions' default arguments would hold it to the end
    import torch.distributed.nn

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # gradients on GPUs travel over NCCL, checkpoints and small sums over gloo
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        timeout=timedelta(hours=12),  # rank 0 may take that long to prepare a corpus
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()
        # This ends gloo's threads, unless a cache of FSDP2's holds the group. A thread that lets go
        # of its last tensor while the interpreter is ending aborts the process (pytorch issue
        # 190489), and torchrun then calls a run that has saved everything failed.
        time.sleep(0.5)


def is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def get_world_size() -> int:
    return distributed.get_world_size() if is_distributed() else 1


def get_rank() -> int:
    return distributed.get_rank() if is_distributed() else 0


def barrier() -> None:
    """Wait until every rank has reached this call."""
    if get_world_size() > 1:
        sum_over_ranks([0.0], torch.device("cpu"))


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Each value, summed over all ranks."""
    if get_world_size() == 1:
        return values
    # float64, or counts above 2**24 would be rounded; which Apple's GPUs do not have
    together = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(together)
    return together.tolist()


def sum_tensor_over_ranks(tensor: Tensor) -> Tensor:
    """The tensor itself, in place the sum of those of all ranks."""
    if get_world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def broadcast_from_rank_zero(value: float, device: torch.device) -> float:
    """Rank 0's value. Decisions that all ranks make alike need one number, to the last bit."""
    return sum_over_ranks([value if get_rank() == 0 else 0.0], device)[0]


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Rank 0 runs the body first, and the others after it: for work whose result is cached, such as
    tokenizing a corpus."""
    if get_rank() != 0:
        barrier()
    yield
    if get_rank() == 0:
        barrier()


# ---- averaged gradients


class LossOfModel(nn.Module):
    """Model and loss as one module, since DDP follows what happens inside one `forward`."""

    def __init__(self, model: nn.Module, loss_function: Callable) -> None:
        super().__init__()
        self.model, self.loss_function = model, loss_function

    def forward(self, batch: Any) -> tuple[Tensor, Tensor | int]:
        return self.loss_function(self.model, batch)


def with_averaged_gradients(model: nn.Module, loss_function: Callable) -> nn.Module:
    """batch -> (sum, count), whose backward also averages the gradients over the ranks."""
    loss = LossOfModel(model, loss_function)
    if get_world_size() == 1:
        return loss
    # else dropout would drop the same activations on every rank
    torch.manual_seed(torch.initial_seed() + get_rank())
    if is_sharded(model):
        return loss
    return DistributedDataParallel(loss)


def gradient_sync(loss: nn.Module, now: bool) -> AbstractContextManager:
    """Whether backward inside averages the gradients over the ranks. Only that of a step's last
    micro-batch has to; until then each rank accumulates its own."""
    if isinstance(loss, DistributedDataParallel):
        return nullcontext() if now else loss.no_sync()
    if isinstance(loss, LossOfModel):
        for part in sharded_parts(loss.model):
            part.set_requires_gradient_sync(now)  # type: ignore[operator]
    return nullcontext()


# ---- sharded parameters


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has been applied to the model."""
    return bool(sharded_parts(model))


def sharded_parts(model: nn.Module) -> list[nn.Module]:
    """What `shard` has sharded: the model, or the children of a module that holds several."""
    return [module for module in (model, *model.children()) if hasattr(module, "unshard")]


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a DTensor, gathered from the ranks."""
    # only a DTensor has this; its class takes a second to import
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded_like(like: Tensor, whole: Tensor) -> Tensor:
    """The reverse: a tensor that every rank has whole, sharded as `like` is."""
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh  # type: ignore[attr-defined]
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements)  # type: ignore[attr-defined]


def shard(model: nn.Module, precision: str = "auto") -> None:
    """Shard the parameters over all ranks, in place (FSDP2). A block's parameters are gathered
    while it computes, forward and backward, and freed afterwards; gradients and optimizer states
    stay sharded. Make the optimizers afterwards, since they refer to parameters.

    model: a GPT2; or a module that holds several models, as `ActorCritic`: each of its children is
    sharded by itself, for it also computes without the others.
    Raises ValueError without torchrun, and NotImplementedError on a CPU with torch 2.6, which
    shards on GPUs alone.
    """
    if not is_distributed():
        raise ValueError("there are no ranks to shard the model over: start it with torchrun")
    device = next(model.parameters()).device
    if device.type == "cpu" and not can_shard_on_cpu():
        raise NotImplementedError(
            f"torch {torch.__version__} can shard a model over GPUs alone: install a newer torch, "
            "or let every rank hold the whole model (DDP: leave shard out)"
        )
    in_bfloat16 = best_precision(device, precision) == "bf16"
    parts = [model] if isinstance(model, GPT2) else list(model.children())
    for module in dict.fromkeys((model, *parts)):
        # the unsharded structure, for `gathered`; a tuple hides it from `nn.Module`
        object.__setattr__(module, "whole_model", (deepcopy(module).to("meta"),))
    for part in parts:
        shard_part(part, in_bfloat16)


def shard_part(part: nn.Module, in_bfloat16: bool) -> None:
    """A GPT2, block by block; or a layer."""
    from torch.distributed import fsdp  # hundreds of modules, for those who need them

    policy = fsdp.MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if in_bfloat16 else None, reduce_dtype=torch.float32
    )
    if isinstance(part, GPT2):
        for block in part.trf_blocks:
            fsdp.fully_shard(block, mp_policy=policy)
    fsdp.fully_shard(part, mp_policy=policy)
    if isinstance(part, GPT2):
        fsdp.register_fsdp_forward_method(part, "hidden_states")


def can_shard_on_cpu() -> bool:
    """FSDP2 records events in streams, which torch 2.6 has for GPUs alone."""
    return hasattr(torch.cpu.Stream, "record_event")


def reshard(model: nn.Module) -> None:
    """Free the parameters that a forward pass without backward has gathered."""
    for part in sharded_parts(model):
        part.reshard()  # type: ignore[operator]


@contextmanager
def unsharded(model: GPT2) -> Iterator[None]:
    """Inside, every rank holds all parameters of a sharded model, gathered once, and calls it as
    often as it likes without the others. Generation needs this: ranks whose responses end early
    would not take part in gathering for the longer ones, and these would wait for ever.

    Memory: the whole model on each rank, in the dtype in which it computes.
    """
    if not is_sharded(model):
        yield
        return
    parts: list[Any] = [*model.trf_blocks, model]
    # FSDP2's hooks around `hidden_states` end before those around `forward`, which then take the
    # forward pass for over and free the embeddings whatever they are told.
    hidden_states = vars(model).pop("hidden_states")
    try:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        yield
    finally:
        vars(model)["hidden_states"] = hidden_states
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)  # as `shard` does
            part.reshard()


def save_whole(save: Callable[[Any, Path], object], model: nn.Module, folder: Path) -> None:
    """Save the model from rank 0, gathered from all ranks if it is sharded."""
    if is_sharded(model):
        model = gathered(model)
    if get_rank() == 0:
        save(model, folder)
    barrier()


@torch.no_grad()
def gathered(model: nn.Module) -> nn.Module:
    """The whole model on rank 0, on the CPU, gathered tensor by tensor; empty on the others."""
    whole: nn.Module = deepcopy(model.whole_model[0])  # type: ignore[index, assignment]
    if get_rank() == 0:
        whole.to_empty(device="cpu")
    places = whole.state_dict(keep_vars=True)
    for name, tensor in model.state_dict().items():
        full = whole_tensor(tensor)
        if get_rank() == 0:
            places[name].copy_(full)
    return whole
