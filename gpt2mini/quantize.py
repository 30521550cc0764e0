"""`quantize()`: an inference-only form of a model with fewer bits per weight.

To generate a token, every weight is read once, so a model with a quarter of the bytes generates
several times as fast. Norms, biases and the embedding stay as they are.

    model = GPT2.from_pretrained("gpt2").quantize("int8")  # or "int4", "fp16", "bf16"

This is the one second form of the architecture (`QuantizedBlock`), and it proves itself: each new
block is compared with the block that it replaces when it is made.
"""

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from typing import TypeGuard

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gpt2mini.cache import LayerCache
from gpt2mini.config import GPT2Config
from gpt2mini.masking import build_attn_mask
from gpt2mini.model import GPT2, MLP, MultiHeadAttention, TiedHead, TransformerBlock, call_layer
from gpt2mini.modes import evaluating, has_hooks, has_hooks_inside
from gpt2mini.quantized_layers import (
    FORMATS,
    quantized_copy,
    quantized_linear,
    refuse_quantized,
    refuse_training,
)


class QuantizedBlock(nn.Module):
    """A `TransformerBlock` for inference, in which query, key and value are one product.

    The one second form of the architecture. `quantize_model` uses it only where it gives what the
    block gives that it replaces.
    """

    def __init__(self, block: TransformerBlock, weights: str) -> None:
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.n_heads, self.gelu = attn.n_heads, mlp.gelu
        self.norm1, self.norm2 = block.norm1, block.norm2
        parts = [attn.query, attn.key, attn.value]
        biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
        self.query_key_value = quantized_linear(
            torch.cat([part.weight for part in parts]),
            torch.cat(biases) if biases else None,
            weights,
        )
        self.attn_out = quantized_copy(attn.attn_out, weights)
        self.mlp_in = quantized_copy(mlp.mlp_in, weights)
        self.mlp_out = quantized_copy(mlp.mlp_out, weights)

    def forward(
        self,
        x: Float[Tensor, "batch tokens emb"],
        attn_mask: Bool[Tensor, "#batch 1 tokens total"] | None = None,
        cache: LayerCache | None = None,
        last_only: bool = False,
    ) -> Float[Tensor, "batch outputs emb"]:
        refuse_training(self, x)
        projected = self.query_key_value(self.norm1(x))  # (batch, tokens, 3 * emb)
        projected = projected.unflatten(2, (3, self.n_heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # (batch, heads, tokens, head_dim)
        if cache is not None:
            key, value = cache.append(key, value)  # (batch, heads, total, head_dim)
        if last_only:
            x, query = x[:, -1:], query[:, :, -1:]
            attn_mask = None if attn_mask is None else attn_mask[..., -1:, :]
        # A plain bool, as in `MultiHeadAttention`.
        is_causal = True if attn_mask is None and query.shape[2] == key.shape[2] else False  # noqa: SIM210
        context = F.scaled_dot_product_attention(  # (batch, heads, tokens, head_dim)
            query, key, value, attn_mask=attn_mask, is_causal=is_causal
        )
        x = x + self.attn_out(context.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.mlp_in(self.norm2(x)), approximate=self.gelu)
        return x + self.mlp_out(hidden)  # (batch, tokens, emb)


class QuantizedHead(nn.Module):
    """A head over the vocabulary, with a quantized copy of its weight.

    The mean of the rows is kept in float32. It adds the same to every logit, and in a trained GPT-2
    it is most of them: without it, the bfloat16 output of the kernels resolves the differences.
    """

    bias = None
    mean: Float[Tensor, " emb"]

    def __init__(self, head: TiedHead | nn.Linear, weights: str) -> None:
        super().__init__()
        self.register_buffer("mean", head.weight.float().mean(dim=0))
        self.centered = quantized_linear(head.weight.float() - self.mean, None, weights)

    @property
    def out_features(self) -> int:
        return self.centered.out_features

    @property
    def weight(self) -> Float[Tensor, "vocab emb"]:
        return self.centered.dequantized() + self.mean

    def forward(self, hidden: Float[Tensor, "*axes emb"]) -> Float[Tensor, "*axes vocab"]:
        shared = hidden @ self.mean.to(hidden.dtype)  # (*axes)
        return self.centered(hidden) + shared[..., None]


@torch.no_grad()
def quantize_model(model: GPT2, weights: str = "int8") -> GPT2:
    """Replace, in place, the linear layers of the blocks and a head over the vocabulary.

    The model is frozen and in eval mode afterwards, on the device where it is: move it there
    before. A head of your own (a classifier's, for instance) and layers with forward hooks stay
    as they are. Forward hooks stay in force, and so do their handles; they are also called while
    blocks are compared. Returns the model.
    Raises ValueError, and leaves the model as it was, for a format it does not know, adapters, a
    model quantized already, or a block whose output differs when its layers are quantized.
    """
    if weights not in FORMATS:
        raise ValueError(f"weights must be one of {', '.join(FORMATS)}, not {weights!r}")
    refuse_quantized(model, "to quantize")
    for name, module in model.trf_blocks.named_modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            raise ValueError(
                f"trf_blocks.{name} is a {type(module).__name__}; only plain linear layers can be "
                "quantized: merge_lora(model) first"
            )
    with evaluating(model):
        stream = probe_stream(model)  # (3, tokens, emb)
        blocks = []
        for layer, block in enumerate(model.trf_blocks):
            blocks.append(quantized_block(block, weights, f"trf_blocks.{layer}", stream, model))
            stream = block(stream, None, None)
        # Four bits in the head too would cost gpt2-nano more than twice as much perplexity.
        head = quantized_head(model, "int8" if weights == "int4" else weights)
    model.trf_blocks, model.out_head = nn.ModuleList(blocks), head
    return model.requires_grad_(False).eval()


def probe_stream(model: GPT2) -> Float[Tensor, "batch tokens emb"]:
    """The residual stream of random token ids, as it enters the first block."""
    tokens = min(16, model.config.context_length)
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(model.config.vocab_size, (3, tokens), generator=generator)
    return model.residual_stream(token_ids.to(model.tok_emb.weight.device), n_blocks=0)


def quantized_block(
    block: nn.Module, weights: str, name: str, stream: Tensor, model: GPT2
) -> nn.Module:
    """The block with quantized layers: as one function if that gives the same, else a copy of the
    block itself. Raises ValueError if even that differs by more than the format's rounding.

    stream: hidden states that enter the block, (batch, tokens, emb).
    """
    # In half precision the rounding of the stream would hide what a block adds.
    is_exact = all(parameter.dtype == torch.float32 for parameter in block.parameters())
    exact = block if is_exact else copy_with_hooks(block).float()
    outputs = partial(outputs_of, stream=stream.float(), config=model.config)
    expected = outputs(with_rounded_weights(exact, weights))
    if can_be_fused(exact):
        fused = QuantizedBlock(exact, weights)
        if are_close(outputs(fused), expected):
            assert isinstance(block, TransformerBlock)  # as its exact copy
            return fused if is_exact else QuantizedBlock(block, weights)
    try:
        found = outputs(with_quantized_layers(exact, weights))
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be computed with quantized layers: {error}") from error
    if not are_close(found, expected):
        raise ValueError(
            f"{name}, a {type(block).__name__}, gives something else with quantized layers: it "
            "cannot be quantized"
        )
    return with_quantized_layers(block, weights)


def copy_with_hooks(block: nn.Module) -> nn.Module:
    """A deep copy that shares the forward hooks: a copy of a hook would write to a copy of its
    owner, and a handle would remove the hook from the block alone."""
    owned = [(module, name) for module in block.modules() for name in vars(module)]
    hooks = [vars(module)[name] for module, name in owned if name.startswith("_forward_")]
    return deepcopy(block, {id(one): one for one in hooks})


def with_quantized_layers(block: nn.Module, weights: str) -> nn.Module:
    """A copy in which the plain linear layers without hooks are quantized."""
    copy = copy_with_hooks(block)
    for path, layer in plain_linear_layers(block):
        copy.set_submodule(path, quantized_copy(layer, weights))
    return copy


def with_rounded_weights(block: nn.Module, weights: str) -> nn.Module:
    """A copy whose layers stay as they are, with the weights that the quantized ones will have."""
    copy = copy_with_hooks(block)
    for path, layer in plain_linear_layers(block):
        rounded = quantized_copy(layer, weights).dequantized()
        copy.get_parameter(f"{path}.weight").copy_(rounded)
    return copy


def plain_linear_layers(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(path, layer) of the layers that are quantized: of torch's own class, without hooks."""
    for path, layer in block.named_modules():
        if type(layer) is nn.Linear and not has_hooks(layer):
            yield path, layer


def can_be_fused(block: nn.Module) -> TypeGuard[TransformerBlock]:
    """Whether the block consists of the layers that `QuantizedBlock` takes, without hooks."""
    return (
        type(block) is TransformerBlock
        and type(block.attn) is MultiHeadAttention
        and type(block.mlp) is MLP
        and type(block.norm1) is type(block.norm2) is nn.LayerNorm
        and are_alike(block.attn.query, block.attn.key, block.attn.value)
        and all(type(x) is nn.Linear for x in (block.attn.attn_out, block.mlp.mlp_in))
        and type(block.mlp.mlp_out) is nn.Linear
        and not has_hooks_inside(block)
    )


def are_alike(query: nn.Module, key: nn.Module, value: nn.Module) -> bool:
    """Whether all are plain linear layers, with biases or without."""
    layers = (query, key, value)
    plain = all(type(layer) is nn.Linear for layer in layers)
    return plain and len({layer.bias is None for layer in layers}) == 1


def outputs_of(block: nn.Module, stream: Tensor, config: GPT2Config) -> list[Tensor]:
    """What a block adds to hidden states, and what its attention gathers: for all tokens at once;
    for three quarters of them, if that is any, and then the rest with a cache (the kernels differ
    for few rows and many); and for the last of a text that fills the context."""
    batch, tokens, _ = stream.shape
    past = 3 * tokens // 4
    shape = (batch, config.n_heads, tokens, config.head_dim)
    cache = LayerCache(shape, stream.device, stream.dtype)
    mask = build_attn_mask(stream[:, past:, 0], None, past)  # (1, 1, tokens - past, tokens)
    calls = [(stream[:, :past], None), (stream[:, past:], mask)]
    generator = torch.Generator().manual_seed(0)
    order = torch.randint(batch * tokens, (1, config.context_length), generator=generator)
    text = stream.flatten(0, 1)[order.to(stream.device)]  # (1, context_length, emb)
    with AttentionOutputs() as contexts:
        added = [
            block(stream, None, None) - stream,
            *(block(part, mask, cache) - part for part, mask in calls if part.shape[1]),
            call_layer(block, text, None, None, last_only=True) - text[:, -1:],
        ]
    return [*added, *contexts.outputs]


class AttentionOutputs(TorchFunctionMode):
    """Records what `F.scaled_dot_product_attention` returns: a window or a scale of one's own may
    change little of what a block adds."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.outputs.append(result[:, :, -1:] if result.shape[0] == 1 else result)
        return result


def are_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 2e-2) -> bool:
    """Whether each difference is at most this share of the expected tensor, by their norms. (The
    kernels round activations to bfloat16.)"""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return False
    pairs = zip(found, expected, strict=True)
    return all((a - b).norm() <= tolerance * b.norm() for a, b in pairs)


def quantized_head(model: GPT2, weights: str) -> nn.Module:
    """A plain head over the vocabulary, quantized; any other as it is."""
    head = model.out_head
    plain = type(head) in (TiedHead, nn.Linear) and not has_hooks(head)
    if not plain or head.bias is not None or len(head.weight) != model.config.vocab_size:
        return head
    quantized = QuantizedHead(head, weights)
    rounded = with_weight(head, quantized.weight)
    hidden = torch.randn(4, model.config.emb_dim, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(head.weight.device)
    return quantized if are_close([quantized(hidden)], [rounded(hidden)]) else head


def with_weight(head: TiedHead | nn.Linear, weight: Tensor) -> nn.Module:
    """A head of the same class with another weight, (vocab, emb)."""
    if isinstance(head, TiedHead):
        return type(head)(nn.Embedding.from_pretrained(weight))
    # Without memory: a layer that is filled at once would draw random numbers.
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
