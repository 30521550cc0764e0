"""Attention weights, observed and edited where a model calls `F.scaled_dot_product_attention`.

The kernel returns softmax(query @ key.T * scale + mask) @ value and never has all the weights. They
follow from the arguments of the call, whatever the model does before it (another scale, a bias, a
norm on the queries, a sliding window), so nothing here knows how the model computes its arguments.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gpt2mini.modes import forwards_replaced

Edit = Callable[[Tensor], Tensor]  # an activation -> the activation that replaces it


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one call, in the order of `F.scaled_dot_product_attention`."""

    query: Tensor  # (batch, heads, tokens, head_dim)
    key: Tensor  # (batch, heads, total, head_dim); fewer heads with enable_gqa
    value: Tensor  # (batch, heads, total, head_dim); fewer heads with enable_gqa
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def weights(self) -> Float[Tensor, "batch heads tokens total"]:
        """The attention weights before dropout, in float32 or better."""
        wide = torch.promote_types(self.query.dtype, torch.float32)
        query, key = self.query.to(wide), self.for_each_query_head(self.key).to(wide)
        scale = query.shape[3] ** -0.5 if self.scale is None else self.scale
        with torch.autocast(query.device.type, enabled=False):
            scores = query @ key.mT * scale  # (batch, heads, tokens, total)
        mask = self.attn_mask
        if self.is_causal:
            mask = scores.new_ones(scores.shape[2:], dtype=torch.bool).tril()
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask.to(wide)
        # A query that may attend to no key gets zeros, as from the kernel, and not 0 / 0.
        without_keys = scores.isneginf().all(dim=3, keepdim=True)  # (batch, heads, tokens, 1)
        return scores.masked_fill(without_keys, 0).softmax(dim=3).masked_fill(without_keys, 0)

    def context(self, weights: Tensor) -> Float[Tensor, "batch heads tokens head_dim"]:
        """The output of the call if its attention weights were these."""
        weights = F.dropout(weights, self.dropout_p)  # (batch, heads, tokens, total)
        return weights.to(self.value.dtype) @ self.for_each_query_head(self.value)

    def for_each_query_head(self, x: Tensor) -> Tensor:
        """Several query heads may share a key head (Ainslie et al. 2023, grouped queries)."""
        return (
            x.repeat_interleave(self.query.shape[1] // x.shape[1], dim=1) if self.enable_gqa else x
        )


class AttentionEdits(TorchFunctionMode):
    """In force while a block runs: edits of its attention weights, then of its heads' outputs."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.edits: list[tuple[int | None, Edit]] = []  # (head, or None for the weights, edit)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = AttentionCall(*args, **kwargs)
        if call.query.ndim != 4 or call.query.shape[1] != self.n_heads:
            return func(*args, **kwargs)  # no heads to tell apart
        edited = self.edited_weights(call)
        context = func(*args, **kwargs) if edited is None else call.context(edited)
        return self.edited_heads(context)

    def edited_weights(self, call: AttentionCall) -> Tensor | None:
        """None if no edit returns other weights, so that the call may run as it is."""
        edits = [edit for head, edit in self.edits if head is None]
        if not edits:
            return None
        weights = edited = call.weights()
        for edit in edits:
            edited = edit(edited)
        return None if edited is weights else edited

    def edited_heads(self, context: Tensor) -> Float[Tensor, "batch heads tokens head_dim"]:
        for head, edit in self.edits:
            if head is None:
                continue
            output = context[:, head]  # (batch, tokens, head_dim)
            edited = edit(output)
            if edited is not output:
                before, _, after = context.tensor_split((head, head + 1), dim=1)
                context = torch.cat([before, edited[:, None], after], dim=1)
        return context

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self:
            return forward(*args, **kwargs)


# One mode for each block, so that nested edits are applied to one call, the outer ones first.
IN_FORCE: WeakKeyDictionary[nn.Module, AttentionEdits] = WeakKeyDictionary()


@contextmanager
def edited_attention(
    block: nn.Module, n_heads: int, edit: Edit, head: int | None = None
) -> Iterator[None]:
    """Inside, each forward pass of `block` calls `edit` with its attention weights, (batch, heads,
    tokens, total), or with the output of one head, (batch, tokens, head_dim), and goes on with the
    result. Edits of the weights come before those of heads.

    `edit` is called once for each call of `F.scaled_dot_product_attention` whose query has the
    shape (batch, n_heads, tokens, head_dim).
    """
    with ExitStack() as stack:
        if block not in IN_FORCE:
            stack.enter_context(attention_mode(block, AttentionEdits(n_heads)))
        edits = IN_FORCE[block].edits
        edits.append((head, edit))
        stack.callback(edits.remove, (head, edit))
        yield


@contextmanager
def attention_mode(block: nn.Module, mode: AttentionEdits) -> Iterator[None]:
    """Inside, the block runs in the mode. Its forward is replaced, not hooked: activation
    checkpointing may call the forward alone, in the midst of backward."""
    # A partial, so that a deep copy has a forward of its own; it keeps the signature.
    forward = update_wrapper(partial(mode.run, block.forward), block.forward)
    IN_FORCE[block] = mode
    try:
        with forwards_replaced([(block, forward)]):
            yield
    finally:
        del IN_FORCE[block]
