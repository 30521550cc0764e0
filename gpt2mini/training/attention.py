"""A faster `F.scaled_dot_product_attention` for CPUs with bfloat16 instructions.

Forward and backward of torch's kernel take more than twice the time there. The algorithm is that of
Dao et al. 2022, "FlashAttention", without its tiling of keys: a tile of queries at a time, whose
scores stay in the CPU's cache and are not kept; backward recomputes them (section 3.1, appendix
B.2).
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Bfloat16CPUAttention(TorchFunctionMode):
    """Inside, `F.scaled_dot_product_attention` is `attention_by_products` where `is_fit`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) == 3 and is_fit(*args, **kwargs):
            query, key, value = args
            mask, causal = kwargs.get("attn_mask"), kwargs.get("is_causal", False)
            return attention_by_products(query, key, value, mask, causal)
        return func(*args, **kwargs)


def is_fit(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> bool:
    """Whether `attention_by_products` takes a call's arguments, and is faster."""
    mask, causal = options.get("attn_mask"), options.get("is_causal", False)
    return (
        query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and query.shape == key.shape == value.shape
        and query.ndim == 4
        and query.shape[2] >= 64  # with fewer tokens, calling so many products takes longer
        and (mask is None or (mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1] == 1))
        and (mask is None or not causal)
        and options.get("dropout_p", 0.0) == 0.0
        and options.keys() <= {"attn_mask", "dropout_p", "is_causal"}
    )


def attention_by_products(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch heads tokens head_dim"],
    attn_mask: Bool[Tensor, "#batch 1 tokens tokens"] | None = None,
    is_causal: bool = False,
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """softmax(query @ key.T / sqrt(head_dim)) @ value, as `F.scaled_dot_product_attention`.

    The scores are rounded to bfloat16, where torch's kernel keeps float32: the rounding error is
    twice that of bfloat16 inputs alone.
    """
    return Attention.apply(query, key, value, score_bias(query, attn_mask, is_causal), is_causal)


def score_bias(
    query: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> Float[Tensor, "#batch tokens tokens"]:
    """0 where a token may attend to another, minus infinity where it may not."""
    tokens = query.shape[2]
    if attn_mask is not None:
        bias = query.new_zeros(len(attn_mask), tokens, tokens)
        return bias.masked_fill_(~attn_mask[:, 0], -torch.inf)
    bias = query.new_full((1, tokens, tokens), -torch.inf if is_causal else 0.0)
    return bias.triu_(1)


class Attention(torch.autograd.Function):
    """In the notation of FlashAttention's appendix B.2: P are the weights, O the context, dP and dO
    their gradients, and D = rowsum(dO * O), the mean of dP under the weights, is mean_grad."""

    @staticmethod
    def forward(ctx, query, key, value, bias, is_causal):
        ctx.is_causal = is_causal
        context = empty_heads(query)
        with torch.autocast("cpu", enabled=False):
            for sample in range(len(query)):
                q, k, v = query[sample], key[sample], value[sample]  # (heads, tokens, head_dim)
                for rows, seen in query_tiles(query, is_causal):
                    weights = attention_weights(q, k, bias[sample % len(bias)], rows, seen)
                    context[sample, :, rows] = weights.bmm(v[:, seen])
        ctx.save_for_backward(query, key, value, bias, context)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_context):
        query, key, value, bias, context = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        gradients = [empty_heads(query) for _ in range(3)]
        for sample in range(len(query)):
            q, k, v, out, grad_out = (
                heads[sample].contiguous() for heads in (query, key, value, context, grad_context)
            )  # (heads, tokens, head_dim)
            mean_grad = (grad_out * out).sum(dim=2, keepdim=True)  # (heads, tokens, 1)
            grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for rows, seen in query_tiles(query, ctx.is_causal):
                weights = attention_weights(q, k, bias[sample % len(bias)], rows, seen)
                grad_v[:, seen] += weights.mT.bmm(grad_out[:, rows])
                grad_weights = grad_out[:, rows].bmm(v[:, seen].mT)  # (heads, rows, seen)
                grad_scores = grad_weights.sub_(mean_grad[:, rows]).mul_(weights).mul_(scale)
                grad_q[:, rows] = grad_scores.bmm(k[:, seen])
                grad_k[:, seen] += grad_scores.mT.bmm(q[:, rows])
            for whole, part in zip(gradients, (grad_q, grad_k, grad_v), strict=True):
                whole[sample] = part
        return *gradients, None, None


def attention_weights(
    q: Tensor, k: Tensor, bias: Tensor, rows: slice, seen: slice
) -> Float[Tensor, "heads rows seen"]:
    """Of one sample: the attention weights of the queries `rows` over the keys `seen`."""
    scale = q.shape[-1] ** -0.5
    return torch.baddbmm(bias[rows, seen], q[:, rows], k[:, seen].mT, alpha=scale).softmax(dim=2)


def query_tiles(query: Tensor, is_causal: bool) -> Iterator[tuple[slice, slice]]:
    """A tile of queries at a time, and the keys that they may attend to."""
    _, heads, tokens, _ = query.shape
    size = max(128, 1024 // heads)  # a few hundred thousand scores per sample
    for start in range(0, tokens, size):
        end = min(start + size, tokens)
        yield slice(start, end), slice(0, end if is_causal else tokens)


def empty_heads(like: Tensor) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Laid out as (batch, tokens, heads, head_dim): joining the heads then copies nothing."""
    batch, heads, tokens, head_dim = like.shape
    return like.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
