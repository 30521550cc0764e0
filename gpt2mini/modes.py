"""Borrow a model for training or evaluation and give it back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
