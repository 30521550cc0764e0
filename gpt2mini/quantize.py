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

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2mini.model import GPT2, MultiHeadAttention, TiedHead, TransformerBlock

INT8_KERNEL = getattr(torch, "_weight_int8pack_mm", None)  # not part of torch's public names
FEW_ROWS = {"int8": 32, "bf16": 2}  # up to so many, multiplying beats converting the weights first


class QuantizedLinear(nn.Module):
    """A linear layer that keeps its weight in few bits and can only be read."""

    def __init__(self, weight: Float[Tensor, "out into"], bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Float[Tensor, "*axes into"]) -> Float[Tensor, "*axes out"]:
        if torch.is_grad_enabled() and (self.training or x.requires_grad):
            raise RuntimeError(
                "quantized weights cannot be trained: use the model in eval mode or under "
                "torch.no_grad(); to train, load it again and quantize() afterwards"
            )
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


class JoinedAttention(MultiHeadAttention):
    """Attention whose query, key and value are one product, three times as tall: for a single row
    a kernel spends much of its time on beginning."""

    def __init__(self, attention: MultiHeadAttention, weights: str) -> None:
        nn.Module.__init__(self)  # not MultiHeadAttention's: the weights are there already
        self.n_heads, self.drop_rate = attention.n_heads, attention.drop_rate
        parts = [attention.query, attention.key, attention.value]
        biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
        self.query_key_value = quantized_linear(
            torch.cat([part.weight for part in parts]),
            torch.cat(biases) if biases else None,
            weights,
        )
        self.attn_out = attention.attn_out

    def project(self, x: Float[Tensor, "*axes emb"]) -> Sequence[Float[Tensor, "*axes emb"]]:
        return self.query_key_value(x).chunk(3, dim=-1)


def can_be_joined(attention: nn.Module) -> bool:
    """Whether its query, key and value are as `MultiHeadAttention` makes them, not of your own."""
    if type(attention) is not MultiHeadAttention:
        return False
    parts = (attention.query, attention.key, attention.value)
    biases = {part.bias is None for part in parts if type(part) is nn.Linear}
    return all(type(part) is nn.Linear for part in parts) and len(biases) == 1


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
    before. A classification head stays as it is: it is small. Returns the model.
    Raises ValueError for a format it does not know, adapters, or a model quantized already.
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
    for block in list(model.trf_blocks.modules()):
        if isinstance(block, TransformerBlock) and can_be_joined(block.attn):
            block.attn = JoinedAttention(block.attn, weights)
    for part in list(model.trf_blocks.modules()):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(part, name, quantized_linear(layer.weight, layer.bias, weights))
    head, vocab = model.out_head, model.config.vocab_size
    if isinstance(head, TiedHead | nn.Linear) and head.bias is None and len(head.weight) == vocab:
        model.out_head = QuantizedHead(head, weights)
    return model.requires_grad_(False).eval()


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


def emulates_bfloat16(device: torch.device) -> bool:
    features: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and not (features.get("amx_bf16") or features.get("avx512_bf16"))


def refuse_quantized(model: nn.Module, purpose: str) -> None:
    """Raise ValueError for a quantized model, where the weights themselves are needed."""
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError(
            f"the weights are quantized, which cannot be undone, and {purpose} needs the weights "
            "themselves: load the model again and quantize() it last"
        )
