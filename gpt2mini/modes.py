"""Change the mode or the forward functions of a model for a while, and restore them."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set train or eval mode inside the context; restore each module's own mode on exit."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients."""
    with mode(model, training=False), torch.no_grad():
        yield


@contextmanager
def forwards_replaced(replaced: Sequence[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Inside the context each module calls the function beside it as its `forward`; its hooks are
    called as usual.

    Let the function be a `partial` of the module's own `forward`: a deep copy of the module then
    computes with the copy's weights.
    """
    before = [(module, vars(module).get("forward")) for module, _ in replaced]
    try:
        for module, forward in replaced:
            vars(module)["forward"] = forward  # hides the class's own
        yield
    finally:
        for module, own in before:
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own


def uncompiled(model: Model) -> Model:
    """The model inside `torch.compile(model)`, which puts `_orig_mod.` before its parameters' names
    and shares them; any other is returned as it is."""
    return getattr(model, "_orig_mod", model)


def accepts_argument(function: Callable, name: str) -> bool:
    """Whether a function has a parameter of that name, or takes any (**kwargs). Inside a compiled
    graph, where a signature cannot be read: no."""
    if torch.compiler.is_compiling():
        return False
    parameters = inspect.signature(function).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    return name in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has forward hooks or forward pre-hooks of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_hooks_inside(module: nn.Module) -> bool:
    """Whether the module, or any inside it, has such hooks."""
    return any(map(has_hooks, module.modules()))
