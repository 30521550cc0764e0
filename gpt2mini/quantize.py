"""`quantize()`: an inference-only form of a model with fewer bits per weight.

To generate a token, every weight is read once, so a model with a quarter of the bytes generates
several times as fast. Norms, biases and the embedding stay as they are.

    model = GPT2.from_pretrained("gpt2").quantize("int8")  # or "fp16", "bf16"

This is the one second form of the architecture (`QuantizedBlock`), and it proves itself: each new
block is compared with the block that it replaces when it is made.
"""

from copy import deepcopy
from typing import TypeGuard

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2mini.cache import LayerCache
from gpt2mini.config import GPT2Config
from gpt2mini.masking import build_attn_mask
from gpt2mini.model import GPT2, MLP, MultiHeadAttention, TiedHead, TransformerBlock, call_layer
from gpt2mini.modes import evaluating, has_hooks
from gpt2mini.quantized_layers import (
    quantized_copy,
    quantized_linear,
    refuse_quantized,
    refuse_training,
)


class QuantizedBlock(nn.Module):
    """A `TransformerBlock` as one function, for inference: query, key and value are one product,
    and its layers are called as functions. Hooks on the block are called, on its layers not.

    The one second form of the architecture. `quantize_model` uses it only where it gives what the
    block gives that it replaces.
    """

    def __init__(self, block: TransformerBlock, weights: str) -> None:
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.n_heads = attn.n_heads
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
        # Calling a module takes as long as a LayerNorm of one row, so the functions are kept.
        self.attention_functions = (
            self.norm1.forward,
            self.query_key_value.of_rows,
            self.attn_out.of_rows,
        )
        self.mlp_functions = (self.norm2.forward, self.mlp_in.of_rows, self.mlp_out.of_rows)

    def forward(
        self,
        x: Float[Tensor, "batch tokens emb"],
        attn_mask: Bool[Tensor, "#batch 1 tokens total"] | None = None,
        cache: LayerCache | None = None,
        last_only: bool = False,
    ) -> Float[Tensor, "batch outputs emb"]:
        refuse_training(self, x)
        norm1, query_key_value, attn_out = self.attention_functions
        norm2, mlp_in, mlp_out = self.mlp_functions
        batch, tokens, emb = x.shape
        rows = x.reshape(-1, emb)  # (batch * tokens, emb)
        projected = query_key_value(norm1(rows)).view(batch, tokens, 3, self.n_heads, -1)
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # (batch, heads, tokens, head_dim)
        if cache is not None:
            key, value = cache.append(key, value)  # (batch, heads, total, head_dim)
        if last_only:
            rows, query = x[:, -1], query[:, :, -1:]
            attn_mask = None if attn_mask is None else attn_mask[..., -1:, :]
        is_causal = attn_mask is None and query.shape[2] > 1
        context = F.scaled_dot_product_attention(  # (batch, heads, tokens, head_dim)
            query, key, value, attn_mask=attn_mask, is_causal=is_causal
        )
        rows = rows + attn_out(context.transpose(1, 2).reshape(-1, emb))
        rows = rows + mlp_out(F.gelu(mlp_in(norm2(rows)), approximate="tanh"))
        return rows.view(batch, -1, emb)


class QuantizedHead(TiedHead):
    """A head over the vocabulary, with a quantized copy of its weight.

    The mean of the rows is kept in float32. It adds the same to every logit, and in a trained GPT-2
    it is most of them: without it, the bfloat16 output of the kernels resolves the differences.
    """

    mean: Float[Tensor, " emb"]

    def __init__(self, head: TiedHead | nn.Linear, weights: str) -> None:
        nn.Module.__init__(self)  # not TiedHead's: there is no embedding to refer to
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
    as they are. Returns the model.
    Raises ValueError, and leaves the model as it was, for a format it does not know, adapters, a
    model quantized already, or a block whose output differs when its layers are quantized.
    """
    if weights not in ("int8", "fp16", "bf16"):
        raise ValueError(f"weights must be 'int8', 'fp16' or 'bf16', not {weights!r}")
    refuse_quantized(model, "to quantize")
    for name, module in model.trf_blocks.named_modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            raise ValueError(
                f"trf_blocks.{name} is a {type(module).__name__}; only plain linear layers can be "
                "quantized: merge_lora(model) first"
            )
    with evaluating(model):
        blocks = [
            quantized_block(block, weights, f"trf_blocks.{layer}", model.config)
            for layer, block in enumerate(model.trf_blocks)
        ]
        head = quantized_head(model, weights)
    model.trf_blocks, model.out_head = nn.ModuleList(blocks), head
    return model.requires_grad_(False).eval()


def quantized_block(block: nn.Module, weights: str, name: str, config: GPT2Config) -> nn.Module:
    """The block with quantized layers: as one function if that gives the same, else a copy of the
    block itself. Raises ValueError if even that differs by more than the format's rounding."""
    exact = deepcopy(block).float()  # differences are small beside the rounding of half precision
    try:
        expected = outputs_of(with_rounded_weights(exact, weights), config)
        found = outputs_of(with_quantized_layers(exact, weights), config)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be computed with quantized layers: {error}") from error
    if not are_close(found, expected, 2e-2):  # the kernels round activations to bfloat16
        raise ValueError(
            f"{name}, a {type(block).__name__}, gives something else with quantized layers: it "
            "cannot be quantized"
        )
    if can_be_fused(block) and can_be_fused(exact):
        fused = outputs_of(QuantizedBlock(exact, weights), config)
        if are_close(fused, found, 1e-3):
            return QuantizedBlock(block, weights)
    return with_quantized_layers(block, weights)


def with_quantized_layers(block: nn.Module, weights: str) -> nn.Module:
    """A copy in which the plain linear layers without hooks are quantized."""
    copy = deepcopy(block)
    for path, layer in block.named_modules():
        if type(layer) is nn.Linear and not has_hooks(layer):
            copy.set_submodule(path, quantized_copy(layer, weights))
    return copy


def with_rounded_weights(block: nn.Module, weights: str) -> nn.Module:
    """A copy whose layers stay as they are, with the weights that the quantized ones will have."""
    copy = deepcopy(block)
    for path, layer in block.named_modules():
        if type(layer) is nn.Linear and not has_hooks(layer):
            rounded = quantized_copy(layer, weights).dequantized()
            copy.get_parameter(f"{path}.weight").copy_(rounded)
    return copy


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
        and not any(map(has_hooks, block.modules()))
    )


def are_alike(query: nn.Module, key: nn.Module, value: nn.Module) -> bool:
    """Whether all are plain linear layers, with biases or without."""
    layers = (query, key, value)
    plain = all(type(layer) is nn.Linear for layer in layers)
    return plain and len({layer.bias is None for layer in layers}) == 1


def outputs_of(block: nn.Module, config: GPT2Config) -> list[Tensor]:
    """What a block adds to random hidden states of three rows: to 40 tokens at once, to 30 and then
    10 with a cache (the kernels differ for few tokens and many), and to the last alone."""
    like = next(p for p in block.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, config.emb_dim, generator=generator).to(like.device, like.dtype)
    shape = (3, config.n_heads, 40, config.head_dim)
    cache = LayerCache(shape, x.device, x.dtype)
    mask = build_attn_mask(x[:, 30:, 0], None, past=30)  # (1, 1, 10, 40)
    outputs = [
        block(x, None, None),
        block(x[:, :30], None, cache),
        block(x[:, 30:], mask, cache),
        call_layer(block, x, None, None, last_only=True),
    ]
    inputs = [x, x[:, :30], x[:, 30:], x[:, -1:]]
    return [output - stream for output, stream in zip(outputs, inputs, strict=True)]


def are_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    """Whether the difference is at most this share of the expected tensor, by their norms."""
    pairs = [(a.float(), b.float()) for a, b in zip(found, expected, strict=True)]
    return all(a.shape == b.shape and (a - b).norm() <= tolerance * b.norm() for a, b in pairs)


def quantized_head(model: GPT2, weights: str) -> nn.Module:
    """A plain head over the vocabulary, quantized; any other as it is."""
    head = model.out_head
    plain = type(head) in (TiedHead, nn.Linear) and not has_hooks(head)
    if not plain or head.bias is not None or len(head.weight) != model.config.vocab_size:
        return head
    quantized = QuantizedHead(head, weights)
    hidden = torch.randn(4, model.config.emb_dim, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(head.weight)
    return quantized if are_close([quantized(hidden)], [head(hidden)], 0.1) else head
