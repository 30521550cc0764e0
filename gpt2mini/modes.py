"""Borrow a model for training or evaluation and give it back as it was."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode inside; on leaving, also by an exception, every module's own is back."""
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
    """Inside, each module computes with the function beside it, whatever hooks it has; on leaving,
    also by Ctrl-C, with what it did before.

    Let the function be a `partial` of the module's own `forward`: a deep copy of the module then
    computes with the copy's weights.
    """
    before = [(module, vars(module).get("forward")) for module, _ in replaced]
    try:
        for module, forward in replaced:
            vars(module)["forward"] = forward  # beside the class's own, which it hides
        yield
    finally:
        for module, own in before:
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own


def accepts_argument(function: Callable, name: str) -> bool:
    """Whether a function has a parameter of that name, or takes any (**kwargs)."""
    if torch.compiler.is_compiling():
        return True  # a signature cannot be read inside a compiled graph
    parameters = inspect.signature(function).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    return name in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks on, or steps in, when the module is called."""
    return has_own_hooks(module) or bool(_has_any_global_hook())


def has_own_hooks(module: nn.Module) -> bool:
    """The same, but for those who look on at all modules, a profiler for instance."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
