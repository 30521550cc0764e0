"""Models that do not fit in one process: every process keeps a part of every parameter.

FSDP2 (Zhao et al. 2023, "PyTorch FSDP"): a block's parameters are gathered when it is to compute,
forward and backward, and let go afterwards; its gradients and optimizer states are spread alike.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpt2mini.device import best_precision
from gpt2mini.model import GPT2
from gpt2mini.training.distributed import barrier, get_rank, is_distributed
from gpt2mini.training.parallel import is_sharded, whole_tensor


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
