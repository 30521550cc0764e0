"""Train in less memory: do not keep what is cheap to compute again.

Backward needs the inputs of every layer, and most of a training step's memory is such inputs that
wait. Those of the linear layers are the outputs of LayerNorm and GELU, whose own inputs wait too.
Computing them a second time costs a few percent of a step and saves more than a third of all
activations. (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", do it to whole
layers; `recompute_blocks` does.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from gpt2mini.model import TransformerBlock


@contextmanager
def recompute_activations(model: nn.Module) -> Iterator[None]:
    """Inside, forward passes keep less for backward; gradients are the same, bit for bit."""
    pairs = [
        (Recomputed(producer), consumer)
        for block in model.modules()
        if isinstance(block, TransformerBlock)
        for producer, consumer in (
            (block.get_submodule("norm1"), block.get_submodule("attn")),
            (block.get_submodule("norm2"), block.get_submodule("mlp.mlp_in")),
            (block.get_submodule("mlp.gelu"), block.get_submodule("mlp.mlp_out")),
        )
    ]
    handles = []
    for recomputed, consumer in pairs:
        handles.append(recomputed.producer.register_forward_hook(recomputed.remember))
        handles.append(consumer.register_forward_pre_hook(recomputed.begin))
        handles.append(consumer.register_forward_hook(recomputed.end, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recompute_blocks(model: nn.Module) -> Iterator[None]:
    """Inside, of each block only the input is kept; the rest is computed again in backward. Memory
    no longer grows with what happens inside a block, for a third more work."""
    blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
    try:
        for block in blocks:
            # beside the class's own forward, which the instance's hides
            vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


class Recomputed:
    """The output of one cheap module, of which autograd inside the consumer keeps a recipe."""

    def __init__(self, producer: nn.Module) -> None:
        self.producer = producer
        self.input: Tensor | None = None
        self.output_address = 0  # by which it is known, without being held
        self.hooks: saved_tensors_hooks | None = None

    def remember(self, producer: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        device = output.device.type
        if torch.is_autocast_enabled(device):
            # Or query, key and value would each cast it for themselves, and each keep its cast.
            output = output.to(torch.get_autocast_dtype(device))
        self.input, self.output_address = arguments[0], output.data_ptr()
        return output

    def begin(self, consumer: nn.Module, arguments: tuple) -> None:
        if self.input is not None and torch.is_grad_enabled():
            self.hooks = recipe(self.producer, self.input.detach(), self.output_address)
            self.hooks.__enter__()

    def end(self, consumer: nn.Module, arguments: tuple, output: Tensor | None) -> None:
        if self.hooks is not None:
            self.hooks.__exit__()
        self.hooks = self.input = None


def recipe(producer: nn.Module, source: Tensor, output_address: int) -> saved_tensors_hooks:
    """Where autograd would keep the output (or a view of it), keep its shape; compute it later."""

    def keep(saved: Tensor) -> Tensor | tuple[torch.Size, torch.dtype]:
        is_output = saved.data_ptr() == output_address and saved.numel() == source.numel()
        return (saved.shape, saved.dtype) if is_output else saved

    def restore(kept: Tensor | tuple[torch.Size, torch.dtype]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        shape, dtype = kept
        return producer.forward(source).to(dtype).view(shape)

    return saved_tensors_hooks(keep, restore)
