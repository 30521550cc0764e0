"""Train in less memory: recompute in backward what is cheap to compute, instead of keeping it.

Backward needs the inputs of every layer, and these activations are most of a training step's
memory. The inputs of the linear layers are outputs of LayerNorm and GELU, whose own inputs are kept
too. Computing them a second time costs a few percent of a step and saves more than a third of all
activations. (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", recompute whole
layers; `activation_checkpointing` does.)
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from gpt2mini.model import GPT2
from gpt2mini.modes import forwards_replaced

# ---- norms and activation functions


class recompute_activations(TorchFunctionMode):  # a context manager, as torch.no_grad
    """Inside, forward passes keep less for backward; gradients are the same, bit for bit.

    Where `F.linear` receives the output of `F.layer_norm` or `F.gelu`, autograd does not keep that
    output, but how to compute it. All other operations keep what they always keep.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and args:
            if func in (F.layer_norm, F.gelu):
                return with_recipe(func, *args, **kwargs)
            if func is F.linear and has_recipe(args[0]):
                return linear_keeping_recipe(*args, **kwargs)
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Recipe:
    """How to compute a tensor a second time. It is an attribute of the tensor, `recipe`, so any
    other tensor that takes its place, such as a hook's result, has none."""

    compute: Callable[[Tensor], Tensor]
    source: Tensor
    source_version: int
    version: int  # of the tensor itself: each in-place operation adds one

    def __call__(self) -> Tensor:
        if self.source._version != self.source_version:
            raise RuntimeError(
                "the input of a layer norm or GELU was modified by an in-place operation after "
                "the forward pass: modify a copy, or train without recompute_activations"
            )
        return self.compute(self.source)


def with_recipe(func: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    output, source = func(input, *args, **kwargs), input.detach()
    compute = partial(func_of_input, func, args, kwargs)
    output.recipe = Recipe(compute, source, source._version, output._version)  # type: ignore[attr-defined]
    return output


def func_of_input(func: Callable[..., Tensor], args: Any, kwargs: Any, input: Tensor) -> Tensor:
    return func(input, *args, **kwargs)


def has_recipe(tensor: Tensor) -> bool:
    """Whether the tensor's recipe gives what the tensor holds now."""
    recipe: Recipe | None = getattr(tensor, "recipe", None)
    return recipe is not None and recipe.version == tensor._version


def linear_keeping_recipe(tensor: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`F.linear`; where autograd would save the first argument (or a view of it), it saves the
    recipe, and the shape."""
    recipe: Recipe = tensor.recipe
    tensor = autocast_input(tensor)
    # An argument's address is its own. Autograd holds on to these functions, so they must not hold
    # the argument.
    address, numel = tensor.data_ptr(), tensor.numel()

    def pack(saved: Tensor) -> Tensor | tuple[torch.Size, torch.dtype]:
        is_all = saved.data_ptr() == address and saved.numel() == numel and saved.is_contiguous()
        return (saved.shape, saved.dtype) if is_all else saved

    def unpack(packed: Tensor | tuple[torch.Size, torch.dtype]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        shape, dtype = packed
        return recipe().to(dtype).view(shape)

    with saved_tensors_hooks(pack, unpack):
        return F.linear(tensor, *args, **kwargs)


def autocast_input(tensor: Tensor) -> Tensor:
    """In the dtype to which autocast would cast it inside `F.linear`, where the cast could not be
    recognized as the tensor; query, key and value would each keep one."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


# ---- whole blocks


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of each GPT-2 in the model, whatever their class."""
    return [b for part in model.modules() if isinstance(part, GPT2) for b in part.trf_blocks]


@contextmanager
def activation_checkpointing(model: nn.Module) -> Iterator[None]:
    """Inside, each block keeps its input alone for backward, which recomputes the rest: activation
    memory is one input a block, for a third more computation."""
    with forwards_replaced([(block, checkpointing(block.forward)) for block in blocks_of(model)]):
        yield


def checkpointing(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`partial(checkpointed, forward)` with the signature of `forward`, which the model reads."""
    return update_wrapper(partial(checkpointed, forward), forward)


def checkpointed(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`forward`, of which autograd keeps the arguments alone.

    Without autocast's cache, in which the weights' casts of all blocks would pile up until the
    forward pass has ended. Nothing is cast twice: a block uses each weight once.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return checkpoint(
            forward, *args, use_reentrant=False, context_fn=same_function_modes, **kwargs
        )
    finally:
        torch.set_autocast_cache_enabled(cached)


def same_function_modes() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of the forward pass and of its recomputation, for `checkpoint`.

    `Tensor.backward` is itself a torch function, inside which no TorchFunctionMode is in force. The
    recomputation enters those of the forward pass again, or it would take other kernels.
    """
    return nullcontext(), entered(_get_current_function_mode_stack())


@contextmanager
def entered(modes: list[TorchFunctionMode]) -> Iterator[None]:
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield


# ---- compilation


@contextmanager
def compiled_blocks(model: nn.Module) -> Iterator[None]:
    """Inside, each block runs through torch.compile, which fuses what lies between two matrix
    products.

    Blocks are alike, so one compilation serves all. Head and loss are not compiled: the loss works
    in chunks already. Raises what torch.compile raises, for instance without a C++ compiler.
    """
    try:
        for block in blocks_of(model):
            block.compile()
        yield
    finally:
        for block in blocks_of(model):
            block._compiled_call_impl = None  # there is no public way back
