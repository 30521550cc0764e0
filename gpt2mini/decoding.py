"""One more token for each row: what `model.py` computes, without calling its modules.

A new token is a single row for each matrix. The processor waits for memory to hand the weights
over, and between two of them it waits for Python: calling a module takes as long as what a
LayerNorm does to one row, and GPT-2 124M calls 170 of them for a token. So generation looks the
layers up once, and then calls torch's functions alone: the same operations in the same order.

A module that may do more than its class says (a hook looks on, it is compiled, its class is your
own) is called as it always is, with the shapes that it knows.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2mini.cache import KeyValueCache, LayerCache
from gpt2mini.masking import last_token
from gpt2mini.model import GPT2, MLP, MultiHeadAttention, TiedHead, TransformerBlock
from gpt2mini.modes import has_hooks
from gpt2mini.quantize import (
    BlockedBfloat16Linear,
    HalfLinear,
    Int8Linear,
    JoinedAttention,
    PackedHalfLinear,
    QuantizedHead,
)

# (rows, into) -> (rows, out)
Layer = Callable[[Tensor], Tensor]
# stream (rows, emb), attn_mask (rows or 1, 1, 1, total) or None, cache -> stream (rows, emb)
Block = Callable[[Tensor, Tensor | None, LayerCache], Tensor]

HAS_MKL = torch.backends.mkl.is_available()

# The classes whose work is repeated below, and what they did when they were imported.
REPEATED: dict[type[nn.Module], Callable] = {
    kind: kind.forward
    for kind in (
        *(TransformerBlock, MultiHeadAttention, JoinedAttention, MLP, TiedHead),
        *(QuantizedHead, nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout),
        *(Int8Linear, HalfLinear, PackedHalfLinear, BlockedBfloat16Linear),
    )
}


class Decoder:
    """A model in eval mode, ready to read one token a row.

    It refers to the model's weights, so it sees them change; layers that are replaced and hooks
    that are added later it does not see.
    """

    def __init__(self, model: GPT2) -> None:
        self.model = model
        own_forward = type(model).forward is not GPT2.forward or "forward" in vars(model)
        self.as_a_whole = own_forward or has_hooks(model)  # then it is the model that is called
        self.blocks = [block_function(block) for block in model.trf_blocks]
        self.head = head_function(model.out_head)

    def logits(
        self, token_ids: Int[Tensor, "rows 1"], cache: KeyValueCache
    ) -> Float[Tensor, "rows vocab"]:
        """`model(token_ids, cache=cache)[:, 0]`, to be called without gradients."""
        if self.as_a_whole:
            return self.model(token_ids, cache=cache)[:, 0]
        return self.head(self.hidden_states(token_ids, cache))

    def last_logits(
        self,
        token_ids: Int[Tensor, "rows columns"],
        is_real: Bool[Tensor, "rows columns"],
        cache: KeyValueCache,
    ) -> Float[Tensor, "rows vocab"]:
        """Those of the last real token of each row of a prompt, and of no other."""
        mask = None if is_real.all() else is_real
        if self.as_a_whole:
            return last_token(self.model(token_ids, mask, cache=cache), is_real)
        hidden = self.model.hidden_states(token_ids, mask, cache=cache)  # (rows, columns, emb)
        return self.head(last_token(hidden, is_real))

    def hidden_states(
        self, token_ids: Int[Tensor, "rows 1"], cache: KeyValueCache
    ) -> Float[Tensor, "rows emb"]:
        """`model.hidden_states(token_ids, cache=cache)[:, 0]`, to be called without gradients."""
        if getattr(self.model.hidden_states, "__func__", None) is not GPT2.hidden_states:
            return self.model.hidden_states(token_ids, cache=cache)[:, 0]  # it is your own
        x, attn_mask = self.model.embed(token_ids, cache=cache)
        x = x[:, 0]  # (rows, emb)
        for block, layer_cache in zip(self.blocks, cache.layers, strict=True):
            x = block(x, attn_mask, layer_cache)
        return self.model.final_norm(x[:, None])[:, 0]


def block_function(block: nn.Module) -> Block:
    """`TransformerBlock.forward` for one token a row."""
    if not (
        isinstance(block, TransformerBlock)
        and all(map(does_only_its_work, (block, block.attn, block.mlp, block.drop)))
    ):
        return lambda x, attn_mask, cache: block(x[:, None], attn_mask, cache)[:, 0]
    attn, mlp = block.attn, block.mlp
    norm1, norm2 = layer_function(block.norm1), layer_function(block.norm2)
    project, attn_out = projection_function(attn), layer_function(attn.attn_out)
    mlp_in, gelu, mlp_out = map(layer_function, (mlp.mlp_in, mlp.gelu, mlp.mlp_out))

    def run(x: Tensor, attn_mask: Tensor | None, cache: LayerCache) -> Tensor:
        heads = (len(x), attn.n_heads, 1, -1)
        query, key, value = (part.view(heads) for part in project(norm1(x)))
        key, value = cache.append(key, value)  # (rows, heads, total, head_dim)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)
        x = x + attn_out(context.reshape(x.shape))
        return x + mlp_out(gelu(mlp_in(norm2(x))))

    return run


def projection_function(attn: MultiHeadAttention) -> Callable[[Tensor], Sequence[Tensor]]:
    """`attn.project` for one token a row."""
    if isinstance(attn, JoinedAttention):
        joined = layer_function(attn.query_key_value)
        return lambda rows: joined(rows).chunk(3, dim=1)
    query, key, value = map(layer_function, (attn.query, attn.key, attn.value))
    return lambda rows: (query(rows), key(rows), value(rows))


def head_function(head: nn.Module) -> Layer:
    """The head's `forward` for the hidden state of one token a row."""
    if isinstance(head, QuantizedHead) and does_only_its_work(head):
        return head.forward
    if isinstance(head, TiedHead | nn.Linear) and does_only_its_work(head):
        return lambda rows: multiply(rows, head.weight, head.bias)
    return lambda rows: head(rows[:, None])[:, 0]


def layer_function(layer: nn.Module) -> Layer:
    """A layer's `forward` for one token a row."""
    if not does_only_its_work(layer):
        return lambda rows: layer(rows[:, None])[:, 0]
    if isinstance(layer, nn.Linear | nn.LayerNorm):
        weight, bias = layer.weight, layer.bias  # to find them in a module takes time too
    if isinstance(layer, nn.Linear):
        return lambda rows: multiply(rows, weight, bias)
    if isinstance(layer, nn.LayerNorm):
        shape, eps = layer.normalized_shape, layer.eps
        return lambda rows: torch.layer_norm(rows, shape, weight, bias, eps)
    return layer.forward


def multiply(
    rows: Float[Tensor, "rows into"], weight: Float[Tensor, "out into"], bias: Tensor | None
) -> Float[Tensor, "rows out"]:
    """`F.linear(rows, weight, bias)`, for a few rows the other way around: weight times columns.

    In float32 MKL, torch's matrix library for x86, is faster so: 1.9 x for a step of GPT-2 124M
    with 2 or 4 rows, 1.4 x with 8, 1.3 x with 32 (AVX2, two cores).
    """
    few_in_float32 = 2 <= len(rows) <= 32 and rows.dtype == weight.dtype == torch.float32
    by_mkl = HAS_MKL and rows.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    if not (few_in_float32 and by_mkl):
        return F.linear(rows, weight, bias)
    product = weight @ rows.mT if bias is None else torch.addmm(bias[:, None], weight, rows.mT)
    return product.mT.contiguous()


def does_only_its_work(module: nn.Module) -> bool:
    """Whether to call the module is to do what its class did when it was imported, no more."""
    kind = type(module)
    return (
        kind.forward is REPEATED.get(kind)
        and not vars(module).keys() & vars(kind).keys()  # a method replaced in the instance
        and module._compiled_call_impl is None
        and not has_hooks(module)
    )
