"""One run in several processes, started by torchrun: who am I, and what do we have together?

In a single process all of this does nothing, so nobody else has to ask how many there are.
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
    """Inside, this is one of the processes that torchrun has started, if it has. Each has a GPU of
    its own, which is what the device "cuda" means to it, or they share the processor."""
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
        timeout=timedelta(hours=12),  # as long as the first may take to prepare a corpus
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
    """Go on when every process has come this far."""
    if get_world_size() > 1:
        sum_over_ranks([0.0], torch.device("cpu"))


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Each value, summed over all processes."""
    if get_world_size() == 1:
        return values
    # float64, or counts above 2**24 would be rounded; which Apple's GPUs do not have
    together = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(together)
    return together.tolist()


def broadcast_from_rank_zero(value: float, device: torch.device) -> float:
    """The first process's value: what all decide by has to be one number, to the last bit."""
    return sum_over_ranks([value if get_rank() == 0 else 0.0], device)[0]


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """For what all need and one can prepare, such as tokenizing a corpus: the others wait, and find
    it done."""
    if get_rank() != 0:
        barrier()
    yield
    if get_rank() == 0:
        barrier()


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


def shard(model: GPT2, precision: str = "auto") -> None:
    """Spread the parameters over all processes, in place: each keeps an equal part of every one,
    and gathers a block only while it computes with it (FSDP2; Zhao et al. 2023). Make optimizers
    afterwards, for they hold parameters. Raises ValueError without torchrun, NotImplementedError on
    a CPU with a torch (2.6) that can do it on GPUs alone."""
    from torch.distributed import fsdp  # hundreds of modules, for those who need them

    if not is_distributed():
        raise ValueError("there are no processes to spread the model over: start it with torchrun")
    if model.tok_emb.weight.device.type == "cpu" and not can_shard_on_cpu():
        raise NotImplementedError(
            f"torch {torch.__version__} can spread a model over GPUs alone: install a newer torch, "
            "or let every process hold the whole model (DDP: leave shard out)"
        )
    # how the model looks when it is whole; a tuple hides it from `nn.Module`
    object.__setattr__(model, "whole_model", (deepcopy(model).to("meta"),))
    half = best_precision(model.tok_emb.weight.device, precision) == "bf16"
    policy = fsdp.MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32
    )
    for block in model.trf_blocks:
        fsdp.fully_shard(block, mp_policy=policy)
    fsdp.fully_shard(model, mp_policy=policy)
    fsdp.register_fsdp_forward_method(model, "hidden_states")


def can_shard_on_cpu() -> bool:
    """FSDP2 records events in streams, which torch 2.6 has for GPUs alone."""
    return hasattr(torch.cpu.Stream, "record_event")


def reshard(model: nn.Module) -> None:
    """Let go of parameters that a forward pass without backward has gathered."""
    if is_sharded(model):
        model.reshard()  # type: ignore[operator]


def save_whole(save: Callable[[Any, Path], object], model: nn.Module, folder: Path) -> None:
    """Let the first process save the model, gathered from all if it is spread over them."""
    if is_sharded(model):
        model = gathered(model)
    if get_rank() == 0:
        save(model, folder)
    barrier()


@torch.no_grad()
def gathered(model: nn.Module) -> nn.Module:
    """The whole model in the first process's memory, a tensor at a time; empty in the others."""
    whole: nn.Module = deepcopy(model.whole_model[0])  # type: ignore[index, assignment]
    if get_rank() == 0:
        whole.to_empty(device="cpu")
    places = whole.state_dict(keep_vars=True)
    for name, tensor in model.state_dict().items():
        full = whole_tensor(tensor)
        if get_rank() == 0:
            places[name].copy_(full)
    return whole
