"""Weights in fewer bits, for inference: to write one token, every weight is read once, so a model
with a quarter of the bytes writes several times as fast.

Only weights are rounded. Activations stay in float32 between layers, norms, biases and the
embedding as they are, so a row's result never depends on its neighbors in the batch.

    model = GPT2.from_pretrained("gpt2").quantize("int8")

    "int8"   a byte a weight: each row of a matrix is integers of -127 to 127 times its own scale
    "fp16"   two bytes, with float32 arithmetic where the CPU has a kernel for it (x86)
    "bf16"   two bytes with a coarser grid; for processors that multiply bfloat16 in hardware

What the layers cost, beside one another: `tests/benchmarks/generation.py`.
"""

from copy import deepcopy
from typing import TypeGuard

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2mini.cache import LayerCache
from gpt2mini.config import GPT2Config
from gpt2mini.device import emulates_bfloat16
from gpt2mini.masking import build_attn_mask
from gpt2mini.model import GPT2, MLP, MultiHeadAttention, TiedHead, TransformerBlock, run
from gpt2mini.modes import evaluating, has_hooks

INT8_KERNEL = getattr(torch, "_weight_int8pack_mm", None)  # not part of torch's public names
FEW_ROWS = {"int8": 32, "bf16": 2}  # up to so many, multiplying beats converting the weights first


class QuantizedLinear(nn.Module):
    """A linear layer that keeps its weight in few bits and can only be read."""

    def __init__(self, weight: Float[Tensor, "out into"], bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Float[Tensor, "*axes into"]) -> Float[Tensor, "*axes out"]:
        refuse_training(self, x)
        if x.ndim == 2:
            return self.of_rows(x)
        product = self.of_rows(x.reshape(-1, self.in_features))  # (rows, out)
        return product.view(*x.shape[:-1], self.out_features)

    def of_rows(self, rows: Float[Tensor, "rows into"]) -> Float[Tensor, "rows out"]:
        product = self.multiply(rows)
        return (product if self.bias is None else product + self.bias).to(rows.dtype)

    def multiply(self, rows: Float[Tensor, "rows into"]) -> Float[Tensor, "rows out"]:
        raise NotImplementedError

    def dequantized(self) -> Float[Tensor, "out into"]:
        raise NotImplementedError


class Int8Linear(QuantizedLinear):
    """Symmetric, one scale for each output: weight = integers * scale, off by half a scale at
    most."""

    integers: Int8[Tensor, "out into"]
    scales: Float[Tensor, " out"]

    def __init__(self, weight: Float[Tensor, "out into"], bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        absmax = weight.float().abs().amax(dim=1).clamp(min=1e-30)  # (out); a row of zeros has 0
        scales = (absmax / 127).bfloat16()  # what the kernel takes; rounded first, it costs nothing
        integers = (weight.float() / scales[:, None].float()).round().clamp(-127, 127)
        self.register_buffer("integers", integers.to(torch.int8))
        self.register_buffer("scales", scales)

    def multiply(self, rows: Float[Tensor, "rows into"]) -> Float[Tensor, "rows out"]:
        on_cpu, few = rows.device.type == "cpu", len(rows) <= FEW_ROWS["int8"]
        # The kernel reads in steps and would read past the end of a matrix of other widths.
        if INT8_KERNEL and on_cpu and few and self.in_features % 32 == 0:
            return INT8_KERNEL(rows.bfloat16(), self.integers, self.scales)
        return F.linear(rows, self.integers.to(rows.dtype)) * self.scales.to(rows.dtype)

    def dequantized(self) -> Float[Tensor, "out into"]:
        return self.integers.float() * self.scales[:, None].float()


class HalfLinear(QuantizedLinear):
    """bfloat16 or float16, multiplied as such."""

    stored: Float[Tensor, "out into"]

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, bias)
        self.register_buffer("stored", weight.to(dtype))

    def multiply(self, rows: Float[Tensor, "rows into"]) -> Float[Tensor, "rows out"]:
        if len(rows) > FEW_ROWS["bf16"] and emulates_bfloat16(rows.device):
            return F.linear(rows, self.stored.to(rows.dtype))
        return F.linear(rows.to(self.stored.dtype), self.stored)

    def dequantized(self) -> Float[Tensor, "out into"]:
        return self.stored.float()


class PackedHalfLinear(QuantizedLinear):
    """float16 in the order in which FBGEMM, torch's matrix library for x86, reads it: widened on
    the way into the processor, multiplied and summed in float32."""

    def __init__(self, weight: Float[Tensor, "out into"], bias: Tensor | None) -> None:
        super().__init__(weight, None)  # the bias goes along
        bias = None if bias is None else bias.detach().float().clone()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)

    def multiply(self, rows: Float[Tensor, "rows into"]) -> Float[Tensor, "rows out"]:
        return torch.ops.quantized.linear_dynamic_fp16(rows.float(), self.packed)

    def dequantized(self) -> Float[Tensor, "out into"]:
        return torch.ops.quantized.linear_unpack_fp16(self.packed)[0]

    def get_extra_state(self) -> dict[str, Tensor | None]:  # for `state_dict`
        weight, bias = torch.ops.quantized.linear_unpack_fp16(self.packed)
        return {"weight": weight.half(), "bias": bias}

    def set_extra_state(self, state: dict[str, Tensor | None]) -> None:
        weight, bias = state["weight"], state["bias"]
        assert weight is not None
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)


class BlockedBfloat16Linear(QuantizedLinear):
    """bfloat16 in the order in which oneDNN, torch's other matrix library, multiplies it. A plain
    matrix would be put in order anew by each product, which takes half as long again."""

    def __init__(self, weight: Float[Tensor, "out into"], bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.blocks = Blocks(weight.bfloat16())

    def multiply(self, rows: Float[Tensor, "rows into"]) -> Float[Tensor, "rows out"]:
        return torch.ops.mkldnn._linear_pointwise(
            rows.bfloat16(), self.blocks.tensor, None, "none", [], ""
        )

    def dequantized(self) -> Float[Tensor, "out into"]:
        return self.blocks.tensor.to_dense().float()

    def get_extra_state(self) -> Tensor:  # for `state_dict`
        return self.blocks.tensor.to_dense()

    def set_extra_state(self, state: Tensor) -> None:
        self.blocks = Blocks(state)


class Blocks:
    """A tensor in oneDNN's own order, which `copy` and `pickle` cannot read."""

    def __init__(self, matrix: Float[Tensor, "out into"]) -> None:
        self.tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous())

    def __deepcopy__(self, memo: dict) -> "Blocks":
        return self  # it is never written to

    def __reduce__(self) -> tuple:
        return Blocks, (self.tensor.to_dense(),)


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


def refuse_training(module: nn.Module, x: Tensor) -> None:
    if torch.is_grad_enabled() and (module.training or x.requires_grad):
        raise RuntimeError(
            "quantized weights cannot be trained: use the model in eval mode or under "
            "torch.no_grad(); to train, load it again and quantize() afterwards"
        )


class QuantizedHead(TiedHead):
    """A head over the vocabulary, with a quantized copy of its weight.

    The mean of the rows is kept apart, in float32. It adds the same to every logit, which is most
    of them in a trained GPT-2: without it, kernels that give bfloat16 have digits for differences.
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
    rounded, replaced = deepcopy(block), deepcopy(block)
    for path, layer in block.named_modules():
        if type(layer) is nn.Linear and not has_hooks(layer):
            quantized = quantized_copy(layer, weights)
            rounded.get_parameter(f"{path}.weight").copy_(quantized.dequantized())
            replaced.set_submodule(path, quantized)
    try:
        expected = outputs_of(rounded, config)
        found = outputs_of(replaced, config)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be computed with quantized layers: {error}") from error
    if not are_close(found, expected, 2e-2):  # the kernels round activations to bfloat16
        raise ValueError(
            f"{name}, a {type(block).__name__}, gives something else with quantized layers: it "
            "cannot be quantized"
        )
    if can_be_fused(block):
        fused = QuantizedBlock(block, weights)
        if are_close(outputs_of(fused, config), found, 1e-3):
            return fused
    return replaced


def can_be_fused(block: nn.Module) -> TypeGuard[TransformerBlock]:
    """Whether the block consists of the layers that `QuantizedBlock` takes, without hooks."""
    return (
        type(block) is TransformerBlock
        and type(block.attn) is MultiHeadAttention
        and type(block.mlp) is MLP
        and type(block.norm1) is type(block.norm2) is nn.LayerNorm
        and all(type(layer) is nn.Linear for layer in projections(block))
        and len({layer.bias is None for layer in projections(block)[:3]}) == 1
        and not any(map(has_hooks, block.modules()))
    )


def projections(block: TransformerBlock) -> list[nn.Linear]:
    attn, mlp = block.attn, block.mlp
    return [attn.query, attn.key, attn.value, attn.attn_out, mlp.mlp_in, mlp.mlp_out]


def outputs_of(block: nn.Module, config: GPT2Config) -> list[Tensor]:
    """What a block adds to random hidden states: to 40 tokens at once, to 30 and 10 with a cache
    (the kernels differ for few rows and many), and to the last alone."""
    like = next(p for p in block.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 40, config.emb_dim, generator=generator).to(like.device, like.dtype)
    shape = (1, config.n_heads, 40, config.head_dim)
    cache = LayerCache(shape, x.device, x.dtype)
    mask = build_attn_mask(x[:, 30:, 0], None, past=30)  # (1, 1, 10, 40)
    outputs = [
        block(x, None, None),
        block(x[:, :30], None, cache),
        block(x[:, 30:], mask, cache),
        run(block, x, None, None, last_only=True),
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


def quantized_copy(layer: nn.Linear, weights: str) -> QuantizedLinear:
    return quantized_linear(layer.weight, layer.bias, weights)


def quantized_linear(
    weight: Float[Tensor, "out into"], bias: Tensor | None, weights: str
) -> QuantizedLinear:
    if weights == "int8":
        return Int8Linear(weight, bias)
    if weights == "fp16" and weight.device.type == "cpu" and has_fbgemm():
        return PackedHalfLinear(weight, bias)
    if weights == "bf16" and weight.device.type == "cpu" and has_onednn():
        return BlockedBfloat16Linear(weight, bias)
    return HalfLinear(weight, bias, torch.float16 if weights == "fp16" else torch.bfloat16)


def has_fbgemm() -> bool:
    """Whether torch has FBGEMM's kernels here: on x86 processors with AVX2."""
    return "fbgemm" in torch.backends.quantized.supported_engines and hasattr(
        torch.ops.quantized, "linear_prepack_fp16"
    )


def has_onednn() -> bool:
    """Whether torch has oneDNN's kernels here, the processor bfloat16, and one may use the other
    (which the variable ONEDNN_MAX_CPU_ISA can forbid)."""
    names = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    return (
        torch.backends.mkldnn.is_available()
        and not emulates_bfloat16(torch.device("cpu"))
        and all(hasattr(torch.ops.mkldnn, name) for name in names)
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def refuse_quantized(model: nn.Module, purpose: str) -> None:
    """Raise ValueError for a quantized model, where the weights themselves are needed."""
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError(
            f"the weights are quantized, which cannot be undone, and {purpose} needs the weights "
            "themselves: load the model again and quantize() it last"
        )
