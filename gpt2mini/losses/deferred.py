"""The model's own forward pass without its last matrix product, which a loss computes in chunks.

The losses need head(hidden_states) a few positions at a time. Whether that is what `model.forward`
computes cannot be read from its class: it may cap the logits (30 * tanh(logits / 30)) or multiply
them by a learned scale, in a subclass, on an instance or in a forward hook. So the model is called
as always, and its head returns a `Deferred` instead of logits. If it comes out of `forward`
untouched, nothing was done with the logits, and they need not exist. If anything uses them, they
are computed there and then, and the model goes on as usual.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from gpt2mini.model import GPT2
from gpt2mini.modes import forwards_replaced, has_hooks, uncompiled


class Deferred(Tensor):
    """The result of `function(*arguments)`, computed when an operation first uses it."""

    # Known without the result.
    METADATA = (Tensor.shape.__get__, Tensor.dtype.__get__)  # type: ignore[attr-defined]

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    result: Tensor | None
    grad_enabled: bool

    @staticmethod
    def of(function: Callable[..., Tensor], *arguments: Any, outputs: int) -> "Deferred":
        """The first argument is (*axes, inputs), the result (*axes, outputs)."""
        x = arguments[0]
        placeholder = torch.empty((), dtype=x.dtype).expand(*x.shape[:-1], outputs)  # one number
        deferred = placeholder.as_subclass(Deferred)
        deferred.function, deferred.arguments, deferred.result = function, arguments, None
        deferred.grad_enabled = torch.is_grad_enabled()
        return deferred

    def compute(self) -> Tensor:
        if self.result is None:
            with torch.set_grad_enabled(self.grad_enabled):  # a forward hook may have switched it
                self.result = self.function(*self.arguments)
        return self.result

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in cls.METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        args, kwargs = tree_map_only(Deferred, Deferred.compute, (args, kwargs or {}))
        return func(*args, **kwargs)


def hidden_states_and_head(
    model: GPT2,
    token_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
    **arguments: Any,
) -> tuple[Float[Tensor, "batch tokens width"], nn.Module]:
    """Hidden states and the head that makes `model(token_ids, attention_mask)` of them. arguments:
    others of the model, such as `cache`.

    Where `forward` does more than that, these are the logits themselves and `nn.Identity()`.
    """
    call = forward_of_sharded(model) if hasattr(model, "unshard") else model
    with deferred_head(model):
        logits = call(token_ids, attention_mask, **arguments)
    if not isinstance(logits, Deferred):
        return logits, nn.Identity()
    if logits.result is not None:  # something has looked at them, or changed them in place
        return logits.result, nn.Identity()
    return logits.arguments[0], model.out_head


def forward_of_sharded(model: GPT2) -> Callable[..., Tensor]:
    """`forward` of a model sharded by FSDP2, without FSDP2's hooks around it, which would release
    the head's weight before the loss uses it. `shard` has put them around `hidden_states`."""
    if len(model._forward_hooks) > 1 or len(model._forward_pre_hooks) > 1:
        raise ValueError(
            "the sharded model has forward hooks, which its loss would leave out: register them on "
            "a part of the model (the blocks, final_norm or out_head), or train without shard"
        )
    return model.forward


@contextmanager
def deferred_head(model: GPT2) -> Iterator[None]:
    """Inside, the output head returns a `Deferred`.

    Not a head with forward hooks, which expect logits; nor in a compiled model, whose compiled code
    would be thrown away.
    """
    head = model.out_head
    if has_hooks(head) or is_compiled(model):
        yield
        return
    outputs = getattr(head, "out_features", model.config.vocab_size)
    compute = head.forward
    with forwards_replaced([(head, lambda x: Deferred.of(compute, x, outputs=outputs))]):
        yield


def is_compiled(model: nn.Module) -> bool:
    """Whether `model.compile()`, `torch.compile(model)` or `model.forward = torch.compile(...)` has
    compiled the model as a whole (the last: or whether it has another `forward` of its own)."""
    whole = model._compiled_call_impl is not None or uncompiled(model) is not model
    return whole or "forward" in vars(model)


def linear_parameters(
    head: nn.Module, hidden: Float[Tensor, "n emb"]
) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) if `head(hidden)` is `F.linear(hidden, weight, bias)`, else None."""
    row = hidden[:1].detach()
    with DeferredLinear() as mode:
        output = head(row)
    linear = mode.deferred
    if linear is None or output is not linear or linear.result is not None:
        return None
    x, weight, bias = linear.arguments
    return (weight, bias) if x is row else None


@torch.no_grad()
def count_outputs(head: nn.Module, hidden: Float[Tensor, "n emb"]) -> int:
    """The number of logits that a head gives; a linear one is not computed for it."""
    with DeferredLinear():
        return head(hidden[:1]).shape[-1]


class DeferredLinear(TorchFunctionMode):
    """Inside, the first `F.linear` returns a `Deferred`."""

    deferred: Deferred | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.linear or self.deferred is not None:
            return func(*args, **(kwargs or {}))
        x, weight, bias = linear_arguments(*args, **(kwargs or {}))
        self.deferred = Deferred.of(F.linear, x, weight, bias, outputs=len(weight))
        return self.deferred


def linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments of `F.linear`, by position or by name, in its order."""
    return input, weight, bias
