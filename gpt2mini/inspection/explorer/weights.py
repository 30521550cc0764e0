"""A model's weights as the page holds them: fewer bits, in one compressed block of bytes.

    index, blob = pack_weights(model, "int8")
    index["trf_blocks.3.attn.query.weight"]
    # {"offset": 2162688, "shape": [256, 256], "dtype": "int8", "scale_offset": 2228224}

    int8      each row of a matrix is integers of -127 to 127 times its own float32 scale
    float16   matrices in half precision

Position vectors are float16 in both, for they are read without a sum that evens out their rounding;
vectors (biases, norms) are float32. A second model is stored as what differs from the first: the
tensors that are not equal, and an adapter as its two small matrices.

The page computes with float32 numbers that these bytes give exactly. `with_packed_weights` returns
a model with the same ones, so that numbers of the page can be compared with numbers of torch.
"""

import gzip
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpt2mini.checkpoints.build import Unfilled
from gpt2mini.inspection.compare import check_same_shapes, effective_weights
from gpt2mini.lora import LoRALinear, lora_layers
from gpt2mini.model import GPT2

PRECISIONS = ("int8", "float16")
ALIGNMENT = 16  # bytes; typed arrays of JavaScript begin at multiples of their element's size


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it is stored: numbers of shape (rows, columns) or (size), and for int8 a scale
    of each row."""

    numbers: np.ndarray
    scales: np.ndarray | None = None

    def restored(self) -> Tensor:
        """The float32 numbers that the page computes with."""
        wide = self.numbers.astype(np.float32)
        return torch.from_numpy(wide if self.scales is None else wide * self.scales[:, None])


@dataclass(frozen=True)
class StoredAdapter:
    """A layer's adapter: W + scale * B @ A takes the place of the first model's W."""

    a: StoredTensor  # (rank, in)
    b: StoredTensor  # (out, rank)
    scale: float

    def change(self) -> Tensor:
        return self.scale * self.b.restored() @ self.a.restored()  # (out, in)


@dataclass(frozen=True)
class PackedModel:
    """tensors, adapters: what is stored. weights: all that the page computes with, float32, those
    shared with the first model included."""

    tensors: dict[str, StoredTensor]
    weights: dict[str, Tensor]
    adapters: dict[str, StoredAdapter] = field(default_factory=dict)


def pack_weights(model: GPT2, precision: str) -> tuple[dict[str, Any], bytes]:
    """(index, blob): where each tensor lies in the uncompressed bytes, and those bytes, gzipped.

    Raises ValueError for an unknown precision.
    """
    return index_and_blob(packed_model(model, precision).tensors)


def with_packed_weights(model: GPT2, precision: str) -> GPT2:
    """A float32 copy of the model in plain layers, in eval mode, whose numbers are exactly those
    that the page computes with."""
    return plain_model(model, packed_model(model, precision).weights)


def packed_model(model: GPT2, precision: str) -> PackedModel:
    tensors = {name: stored(name, w, precision) for name, w in float_weights(model).items()}
    return PackedModel(tensors, {name: tensor.restored() for name, tensor in tensors.items()})


def packed_difference(first: GPT2, packed: PackedModel, other: GPT2, precision: str) -> PackedModel:
    """The second model of a page, as what differs from the first, which is `packed`.

    Raises ValueError, which lists the differences, for models of different shapes.
    """
    base, weights = float_weights(first), comparable_weights(first, other)
    own_head = {name: weights[name] for name in weights if name.startswith("out_head.")}
    check_same_shapes(own_head | base, weights)
    adapters = {
        name: adapter
        for name, layer in lora_layers(other).items()
        if (adapter := stored_adapter(layer, base[f"{name}.weight"])) is not None
    }
    tensors = {
        name: stored(name, weight, precision)
        for name, weight in weights.items()
        if name.removesuffix(".weight") not in adapters
        and not (name in base and torch.equal(base[name], weight))
    }
    restored = {name: tensor.restored() for name, tensor in tensors.items()}
    merged = {
        f"{name}.weight": packed.weights[f"{name}.weight"] + adapter.change()
        for name, adapter in adapters.items()
    }
    return PackedModel(tensors, packed.weights | restored | merged, adapters)


def comparable_weights(first: GPT2, other: GPT2) -> dict[str, Tensor]:
    """The weights of the second model; of one with a tied head the head's too, where the first has
    a head of its own, whose weights it would otherwise share."""
    weights, own = float_weights(other), float_weights(first)
    if "out_head.weight" in own and "out_head.weight" not in weights:
        weights["out_head.weight"] = weights["tok_emb.weight"]
    if "out_head.bias" in own and "out_head.bias" not in weights:
        weights["out_head.bias"] = torch.zeros_like(own["out_head.bias"])
    return weights


def stored_adapter(layer: LoRALinear, base: Tensor) -> StoredAdapter | None:
    """None for an adapter that is switched off, of another kind, or on another weight."""
    same_base = torch.equal(layer.weight.detach().float().cpu(), base)
    if not (type(layer) is LoRALinear and layer.enabled and same_base):
        return None
    a, b = (as_stored(half_if_it_fits(x)) for x in (layer.lora_A, layer.lora_B))
    return StoredAdapter(a, b, layer.scaling)


def float_weights(model: GPT2) -> dict[str, Tensor]:
    """Every weight in force by its name, adapters merged; float32, on the CPU."""
    return {name: weight.float().cpu() for name, weight in effective_weights(model).items()}


def plain_model(model: GPT2, weights: dict[str, Tensor]) -> GPT2:
    """A model of the same config in plain layers with these weights (which it shares)."""
    with Unfilled(torch.float32):
        plain = GPT2(replace(model.config, drop_rate=0.0))
        if "out_head.weight" in weights:
            vocab, emb = weights["out_head.weight"].shape
            plain.out_head = nn.Linear(emb, vocab, bias="out_head.bias" in weights)
    plain.load_state_dict(weights, assign=True)
    return plain.requires_grad_(False).eval()


# ---- one tensor


def stored(name: str, weight: Tensor, precision: str) -> StoredTensor:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be 'int8' or 'float16', not {precision!r}")
    if weight.ndim < 2:
        return as_stored(weight)
    if precision == "int8" and name != "pos_emb.weight":
        return int8_rows(weight)
    return as_stored(half_if_it_fits(weight))


def int8_rows(weight: Tensor) -> StoredTensor:
    """Symmetric: the largest number of a row is 127 or -127 times the row's scale."""
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30)  # (rows); a row of zeros has 0
    integers = (weight / scales[:, None]).round().clamp(-127, 127)
    return StoredTensor(integers.to(torch.int8).numpy(), scales.numpy())


def half_if_it_fits(weight: Tensor) -> Tensor:
    """float16, or float32 where a number is beyond the range of float16."""
    weight = weight.detach().float().cpu()
    return weight.half() if bool(weight.half().isfinite().all()) else weight


def as_stored(weight: Tensor) -> StoredTensor:
    return StoredTensor(weight.detach().cpu().numpy())


# ---- the block of bytes


def index_and_blob(tensors: dict[str, StoredTensor]) -> tuple[dict[str, Any], bytes]:
    """Where each tensor lies, and the bytes of all, gzipped (the same bytes at any time)."""
    bytes_of_all, index = bytearray(), {}
    for name, tensor in tensors.items():
        index[name] = {
            "offset": append(bytes_of_all, tensor.numbers),
            "shape": list(tensor.numbers.shape),
            "dtype": str(tensor.numbers.dtype),
        }
        if tensor.scales is not None:
            index[name]["scale_offset"] = append(bytes_of_all, tensor.scales)
    return index, gzip.compress(bytes(bytes_of_all), compresslevel=9, mtime=0)


def append(bytes_of_all: bytearray, numbers: np.ndarray) -> int:
    """Add numbers, little-endian, at a multiple of the alignment; returns where they begin."""
    bytes_of_all.extend(b"\0" * (-len(bytes_of_all) % ALIGNMENT))
    offset = len(bytes_of_all)
    bytes_of_all.extend(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes())
    return offset


def stored_model(packed: PackedModel) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """(index, adapters, blob) of a model, its adapters' matrices among the tensors."""
    of_adapters, tensors = {}, dict(packed.tensors)
    for layer, adapter in packed.adapters.items():
        names = {"A": f"{layer}.A", "B": f"{layer}.B"}
        tensors |= {names["A"]: adapter.a, names["B"]: adapter.b}
        of_adapters[layer] = {**names, "scale": adapter.scale}
    index, blob = index_and_blob(tensors)
    return index, of_adapters, blob
