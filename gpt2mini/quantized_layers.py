"""Linear layers whose weights have fewer bits, for inference.

Only weights are rounded. Activations stay in float32 between layers, so the result of a row never
depends on the other rows of the batch. Up to the rounding of a product it does depend on their
number, by which the kernel is chosen (`FEW_ROWS`).

    "int8"   a byte per weight: each row of a matrix is integers of -127 to 127 times its own scale
    "int4"   half a byte, and a byte for every 8 weights: each 32 columns of a row have 16 levels
    "fp16"   two bytes, with float32 arithmetic where the CPU has a kernel for it (x86)
    "bf16"   two bytes with fewer digits; for processors that multiply bfloat16 in hardware

Their speeds: `tests/benchmarks/decoding.py`.
"""

from functools import cache

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2mini.device import emulates_bfloat16

FORMATS = ("int8", "int4", "fp16", "bf16")
INT8_KERNEL = getattr(torch, "_weight_int8pack_mm", None)  # not public in torch
INT4_KERNEL = getattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)  # nor is this
GROUP = 32  # neighboring columns of a row that have a scale of their own in int4
FEW_ROWS = {
    "int8": 32,
    "int4": 32,
    "bf16": 2,
}  # rows for which the kernel beats converting


class QuantizedLinear(nn.Module):
    """A linear layer that keeps its weight in fewer bits, for inference."""

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
    """Symmetric, one scale for each output: weight = integers * scale, with an error of at most
    half a scale."""

    integers: Int8[Tensor, "out into"]
    scales: Float[Tensor, " out"]

    def __init__(self, weight: Float[Tensor, "out into"], bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        absmax = weight.float().abs().amax(dim=1).clamp(min=1e-30)  # (out); a row of zeros has 0
        scales = (absmax / 127).bfloat16()  # what the kernel takes; rounded before the integers are
        integers = (weight.float() / scales[:, None].float()).round().clamp(-127, 127)
        self.register_buffer("integers", integers.to(torch.int8))
        self.register_buffer("scales", scales)

    def multiply(self, rows: Float[Tensor, "rows into"]) -> Float[Tensor, "rows out"]:
        on_cpu, few = rows.device.type == "cpu", len(rows) <= FEW_ROWS["int8"]
        # The kernel reads in steps and would read past the end of a matrix of other widths.
        if INT8_KERNEL and on_cpu and few and self.in_features % 32 == 0:
            return INT8_KERNEL(rows.bfloat16(), self.integers, self.scales.bfloat16())
        if rows.dtype == torch.float16:  # which holds no sum of products with integers
            return F.linear(rows, self.dequantized().half())
        return F.linear(rows, self.integers.to(rows.dtype)) * self.scales.to(rows.dtype)

    def dequantized(self) -> Float[Tensor, "out into"]:
        return self.integers.float() * self.scales[:, None].float()


class Int4Linear(QuantizedLinear):
    """16 levels between the lowest and the highest weight (or 0) of each group of 32 columns:
    weight = (integer - 8) * scale + middle, with an error of about half a scale.

    Two integers share a byte, in the order of torch's kernel (see `pack`). For it, columns and rows
    of zeros are added up to whole groups and blocks.
    """

    packed: UInt8[Tensor, "blocks columns half"]
    scales: Float[Tensor, "groups rows 2"]  # of each group: the scale and the middle

    def __init__(self, weight: Float[Tensor, "out into"], bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        block = int4_block() or 32
        padding = (0, -self.in_features % GROUP, 0, -self.out_features % block)
        groups = F.pad(weight.float(), padding).unflatten(1, (-1, GROUP))  # (rows, groups, 32)
        lowest, highest = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)  # (rows, groups)
        step = (highest - lowest) / 15
        # What the kernel takes is bfloat16; rounded before the integers are.
        scale, middle = step.bfloat16().float(), (lowest + 8 * step).bfloat16().float()
        steps = (groups - middle[..., None]) / scale[..., None].clamp(min=1e-30)  # zeros have 0
        integers = (steps.round() + 8).clamp(0, 15)
        self.register_buffer("packed", pack(integers.flatten(1).to(torch.uint8), block))
        scales = torch.stack([scale.T, middle.T], dim=2).bfloat16()
        self.register_buffer("scales", scales.contiguous())

    def multiply(self, rows: Float[Tensor, "rows into"]) -> Float[Tensor, "rows out"]:
        on_cpu, few = rows.device.type == "cpu", len(rows) <= FEW_ROWS["int4"]
        in_its_order = 2 * self.packed.shape[2] == int4_block()
        if on_cpu and few and in_its_order and self.in_features % GROUP == 0:
            packed = self.packed.view(-1, self.in_features // 2)
            scales = self.scales.bfloat16()  # again, where `model.float()` has changed them
            product = INT4_KERNEL(rows.bfloat16(), packed, GROUP, scales)  # type: ignore[misc]
            return product[:, : self.out_features]
        return F.linear(rows, self.dequantized().to(rows.dtype))

    def dequantized(self) -> Float[Tensor, "out into"]:
        scale, middle = self.scales.float().permute(2, 1, 0)[..., None]  # (rows, groups, 1) each
        groups = unpack(self.packed).unflatten(1, (-1, GROUP))  # (rows, groups, 32)
        weight = ((groups.float() - 8) * scale + middle).flatten(1)
        return weight[: self.out_features, : self.in_features]


def pack(
    integers: UInt8[Tensor, "rows columns"], block: int
) -> UInt8[Tensor, "blocks columns half"]:
    """Two integers of 4 bits in a byte: of each block of rows, the first half and the second."""
    low, high = integers.view(-1, 2, block // 2, integers.shape[1]).unbind(1)
    return (low + 16 * high).mT.contiguous()


def unpack(packed: UInt8[Tensor, "blocks columns half"]) -> UInt8[Tensor, "rows columns"]:
    halves = torch.stack([packed & 15, packed >> 4], dim=1)  # (blocks, 2, columns, half)
    return halves.mT.flatten(0, 2)


@cache
def int4_block() -> int | None:
    """The rows of a block for which the order of `pack` is that of torch's int4 kernel, which is
    not documented: 64 with AVX512, 32 with AVX2. None: it has another order, or is not there."""
    if INT4_KERNEL is None:
        return None
    integers = torch.arange(64 * 32, dtype=torch.int32).view(64, 32) * 7 // 5 % 16
    found = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
    of_block = {block: pack(integers.to(torch.uint8), block) for block in (64, 32)}
    return next((b for b, own in of_block.items() if torch.equal(own.view(64, 16), found)), None)


class HalfLinear(QuantizedLinear):
    """bfloat16 or float16, multiplied as such."""

    stored: Float[Tensor, "out into"]

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, bias)
        self.register_buffer("stored", weight.detach().to(dtype))

    def multiply(self, rows: Float[Tensor, "rows into"]) -> Float[Tensor, "rows out"]:
        if len(rows) > FEW_ROWS["bf16"] and emulates_bfloat16(rows.device):
            return F.linear(rows, self.stored.to(rows.dtype))
        return F.linear(rows.to(self.stored.dtype), self.stored)

    def dequantized(self) -> Float[Tensor, "out into"]:
        return self.stored.float()


class PackedHalfLinear(QuantizedLinear):
    """float16, packed for FBGEMM, torch's matrix library for x86: converted when it is loaded,
    multiplied and summed in float32."""

    def __init__(self, weight: Float[Tensor, "out into"], bias: Tensor | None) -> None:
        super().__init__(weight, None)  # the bias is packed with the weight
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
    """bfloat16 in the blocked layout of oneDNN. A plain matrix would be reordered by each product,
    which takes half as long again."""

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
    """A tensor in oneDNN's blocked layout, which `copy` and `pickle` cannot read."""

    def __init__(self, matrix: Float[Tensor, "out into"]) -> None:
        self.tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous())

    def __deepcopy__(self, memo: dict) -> "Blocks":
        return self  # it is never written to

    def __reduce__(self) -> tuple:
        return Blocks, (self.tensor.to_dense(),)


def quantized_copy(layer: nn.Linear, weights: str) -> QuantizedLinear:
    return quantized_linear(layer.weight, layer.bias, weights)


def quantized_linear(
    weight: Float[Tensor, "out into"], bias: Tensor | None, weights: str
) -> QuantizedLinear:
    if weights == "int8":
        return Int8Linear(weight, bias)
    if weights == "int4":
        return Int4Linear(weight, bias)
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


def refuse_training(module: nn.Module, x: Tensor) -> None:
    if torch.is_grad_enabled() and (module.training or x.requires_grad):
        raise RuntimeError(
            "quantized weights cannot be trained: use the model in eval mode or under "
            "torch.no_grad(); to train, load it again and quantize() afterwards"
        )


def refuse_quantized(model: nn.Module, purpose: str) -> None:
    """Raise ValueError for a quantized model, where the weights themselves are needed."""
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError(
            f"the weights are quantized, which cannot be undone, and {purpose} needs the weights "
            "themselves: load the model again and quantize() it last"
        )
