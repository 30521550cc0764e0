"""Train in less memory: do not keep what is cheap to compute again.

Backward needs the inputs of every layer, and most of a training step's memory is such inputs that
wait. Those of the linear layers are the outputs of LayerNorm and GELU, whose own inputs wait too.
Computing them a second time costs a few percent of a step and saves more than a third of all
activations. (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", do it to whole
layers; `activation_checkpointing` does.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from gpt2mini.model import MLP, TransformerBlock
from gpt2mini.modes import forwards_replaced


@contextmanager
def recompute_activations(model: nn.Module) -> Iterator[None]:
    """Inside, forward passes keep less for backward; gradients are the same, bit for bit.

    Norms and activation functions of your own are kept as ever: a second time they might give
    something else.
    """
    pairs: list[tuple[nn.Module, nn.Module]] = []  # whose output is computed again, who keeps it
    for block in model.modules():
        if isinstance(block, TransformerBlock):
            pairs.append((block.norm1, block.attn))
            if isinstance(block.mlp, MLP):
                pairs += [(block.norm2, block.mlp.mlp_in), (block.mlp.gelu, block.mlp.mlp_out)]
    replaced: list[tuple[nn.Module, Callable]] = []
    for producer, consumer in pairs:
        if type(producer) in (nn.LayerNorm, nn.GELU) and "forward" not in vars(producer):
            replaced.append((producer, partial(with_recipe, producer.forward)))
            replaced.append((consumer, partial(keeping_the_recipe, consumer.forward)))
    with forwards_replaced(replaced):
        yield


@contextmanager
def activation_checkpointing(model: nn.Module) -> Iterator[None]:
    """Inside, of each block only the input is kept; the rest is computed again in backward. Memory
    no longer grows with what happens inside a block, for a third more work."""
    blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
    with forwards_replaced([(block, partial(recomputed, block.forward)) for block in blocks]):
        yield


def recomputed(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`forward`, of which backward keeps the arguments alone.

    Without autocast's cache, in which the weights' casts of all blocks would pile up until the
    forward pass has ended. Nothing is cast twice: a block uses each weight once.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    finally:
        torch.set_autocast_cache_enabled(cached)


@dataclass(frozen=True)
class Recipe:
    """How to compute a tensor again. It stands in the tensor's attribute `recipe`, so it goes where
    the tensor goes, and a tensor that somebody puts in its place has none."""

    compute: Callable[[Tensor], Tensor]
    source: Tensor
    version: int  # of the tensor: more by one whenever it is changed in place


def with_recipe(forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    output, device = forward(input), input.device.type
    if torch.is_grad_enabled():
        if torch.is_autocast_enabled(device):
            # Or query, key and value would each cast it for themselves, and each keep its cast.
            output = output.to(torch.get_autocast_dtype(device))
        recipe = Recipe(forward, input.detach(), output._version)
        output.recipe = recipe  # type: ignore[attr-defined]
    return output


def keeping_the_recipe(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Where autograd would keep the first argument (or a view of it), it keeps how to compute it
    again, and its shape."""
    tensor: Any = args[0] if args else None
    recipe: Recipe | None = getattr(tensor, "recipe", None)
    if recipe is None or not torch.is_grad_enabled() or tensor._version != recipe.version:
        return forward(*args, **kwargs)

    # An argument's address is its own. Autograd holds on to these functions, so they must not hold
    # the argument.
    address, numel = tensor.data_ptr(), tensor.numel()

    def keep(saved: Tensor) -> Tensor | tuple[torch.Size, torch.dtype]:
        is_all = saved.data_ptr() == address and saved.numel() == numel and saved.is_contiguous()
        return (saved.shape, saved.dtype) if is_all else saved

    def restore(kept: Tensor | tuple[torch.Size, torch.dtype]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        shape, dtype = kept
        return recipe.compute(recipe.source).to(dtype).view(shape)

    with saved_tensors_hooks(keep, restore):
        return forward(*args, **kwargs)


@contextmanager
def compiled_blocks(model: nn.Module) -> Iterator[None]:
    """Inside, the blocks run compiled. Raises what torch.compile raises, for instance where there
    is no C++ compiler."""
    blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
    try:
        for block in blocks:
            block.compile()
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None  # there is no public way back
