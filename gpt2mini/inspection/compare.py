"""Differences between two models: what training has changed, parameter by parameter.

    comparison = compare_models(base, tuned, token_ids)
    print(comparison)                  # layers, parameters and activations, the most changed first
    comparison.summary()               # the same for JSON

Every row compares two tensors of the same shape, a and b, by the change d = b - a:

    mean|d|, max|d|, std(d)     over all elements; std is the root mean square about the mean of d
    cosine                      mean cosine similarity of the rows of a and b
    distance                    mean Euclidean length of the rows of d
    relative                    |d| / |a|, Euclidean (Frobenius) norms; the tables' order
    rank                        effective rank of d; none of a vector or of a whole layer

A row of a tensor lies along its last axis: a neuron's weights, or one token's activations. Two rows
of zeros have the cosine 1. The effective rank (Roy and Vetterli 2007) is the exponential of the
entropy of the singular values divided by their sum: r equal ones give r, and a LoRA of rank 8 gives
at most 8, if it is not as small as the rounding of the weights that it was merged into. NaN for
tensors that are not finite.

A tensor with a number that is NaN has NaN as its measures, and comes first in the tables.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gpt2mini.files import without_infinities
from gpt2mini.inspection.comparison_table import layer_of, table
from gpt2mini.inspection.tracing import trace
from gpt2mini.lora import lora_layers
from gpt2mini.model import GPT2, TiedHead
from gpt2mini.quantized_layers import refuse_quantized

OF_BLOCKS = ("blocks.*.attn_out", "blocks.*.mlp_out", "blocks.*.stream")
ACTIVATIONS = ("embedding", *OF_BLOCKS, "final_norm", "logits")


@dataclass(frozen=True)
class Difference:
    """The difference of two tensors, or of all tensors of a layer together (see above)."""

    name: str
    layer: str
    shape: tuple[int, ...]  # of a layer: (number of elements,)
    mean_absolute: float
    maximum: float
    standard_deviation: float
    cosine: float
    distance: float
    relative: float  # infinite where a is zero and b is not
    effective_rank: float | None  # None where there is no matrix

    def summary(self) -> dict[str, Any]:
        """For JSON, which has no infinity: null instead."""
        return without_infinities(asdict(self))


@dataclass(frozen=True)
class ModelComparison:
    """Differences of the parameters, of the layers that hold them, and, if token ids were given, of
    the activations; each in the order of the model."""

    layers: list[Difference]
    parameters: list[Difference]
    activations: list[Difference]

    def summary(self) -> dict[str, list[dict[str, Any]]]:
        return {
            "layers": [difference.summary() for difference in self.layers],
            "parameters": [difference.summary() for difference in self.parameters],
            "activations": [difference.summary() for difference in self.activations],
        }

    def table(self, longest: int | None = None) -> str:
        """Three tables, NaN and then the largest relative change first. longest: rows of each; None
        for all."""
        parts = {
            "layer (all weights)": self.layers,
            "parameter": self.parameters,
            "activation": self.activations,
        }
        shown = [table(title, part, longest) for title, part in parts.items() if part]
        return "\n\n".join(shown)

    def __str__(self) -> str:
        return self.table()


def compare_models(
    a: GPT2,
    b: GPT2,
    token_ids: Int[Tensor, "batch tokens"] | None = None,
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
) -> ModelComparison:
    """The change from a to b in the weights and, with token ids, in the activations (at real tokens
    only).

    A layer with an adapter is compared by its effective weight, so an adapted model equals itself
    after merging. If one head is untied, the other is compared with it by its tied weight.
    Raises ValueError for a quantized model and, with a list of the differences, for models whose
    parameters differ in name or shape. `trace` shows the activations of any two models.
    """
    ours, theirs = effective_weights(a), effective_weights(b)
    for model, own, other in ((a, ours, theirs), (b, theirs, ours)):
        if isinstance(model.out_head, TiedHead) and "out_head.weight" in other:
            own["out_head.weight"] = model.out_head.weight.detach()
    check_same_shapes(ours, theirs)
    parameters, layers = [], []
    for layer in dict.fromkeys(map(layer_of, ours)):
        names = [name for name in ours if layer_of(name) == layer]
        pairs = [Pair.of(ours[name], theirs[name]) for name in names]
        parameters += [
            pair.difference(name, layer, tuple(ours[name].shape), pair.effective_rank())
            for name, pair in zip(names, pairs, strict=True)
        ]
        numbers = sum(pair.numbers for pair in pairs)
        layers.append(Pair.sum(pairs).difference(layer, layer, (numbers,), None))
    activations = [] if token_ids is None else compare_activations(a, b, token_ids, attention_mask)
    return ModelComparison(layers, parameters, activations)


def compare_activations(
    a: GPT2, b: GPT2, token_ids: Tensor, attention_mask: Tensor | None
) -> list[Difference]:
    ours, theirs = (
        trace(
            model,
            token_ids.to(model.tok_emb.weight.device),
            None if attention_mask is None else attention_mask.to(model.tok_emb.weight.device),
            ACTIVATIONS,
        )
        for model in (a, b)
    )
    is_real = torch.ones_like(token_ids) if attention_mask is None else attention_mask
    is_real = is_real.bool().cpu()  # (batch, tokens)
    found = []
    for name in ours:
        pair = Pair.of(ours[name].cpu()[is_real], theirs[name].cpu()[is_real])
        rank = pair.effective_rank()
        found.append(pair.difference(name, layer_of(name), tuple(ours[name].shape), rank))
    return found


def effective_weights(model: GPT2) -> dict[str, Tensor]:
    """Every parameter of the model by its name, enabled adapters merged into their layers. Raises
    ValueError for a quantized model, whose matrices are no parameters."""
    refuse_quantized(model, "reading or comparing them")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for layer_name, layer in lora_layers(model).items():
        for name in dict(layer.named_parameters()).keys() - {"weight", "bias"}:
            del weights[f"{layer_name}.{name}"]
        if layer.enabled:
            weights[f"{layer_name}.weight"] = layer.merged_weight().detach()
    return weights


def check_same_shapes(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    lines = [
        f"{name} is {shape_in(ours, name)} in the first and {shape_in(theirs, name)} in the second"
        for name in {**ours, **theirs}
        if shape_in(ours, name) != shape_in(theirs, name)
    ]
    if lines:
        more = f" (and {len(lines) - 4} more)" if len(lines) > 4 else ""
        raise ValueError(
            f"only models of the same shape can be compared: {'; '.join(lines[:4])}{more}"
        )


def shape_in(weights: dict[str, Tensor], name: str) -> str:
    return " x ".join(map(str, weights[name].shape)) if name in weights else "missing"


# ---- measures of one difference


@dataclass(frozen=True)
class Pair:
    """Sums over two tensors, from which every measure follows, also for several pairs together."""

    numbers: int
    rows: int
    absolute: float
    maximum: float
    total: float  # of d
    squares: float  # of d
    squares_of_a: float
    cosines: float
    distances: float
    change: Tensor  # (rows, columns)

    @staticmethod
    def of(a: Tensor, b: Tensor) -> "Pair":
        # In float64: means over 38 million elements, and differences of nearly equal ones.
        a, b = a.cpu().double(), b.cpu().double()  # moved first: Apple's GPUs have no float64
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])  # (rows, columns)
        d = b - a
        return Pair(
            d.numel(),
            len(d),
            float(d.abs().sum()),
            float(d.abs().max()),
            float(d.sum()),
            float(d.square().sum()),
            float(a.square().sum()),
            float(row_cosines(a, b).sum()),
            float(d.norm(dim=1).sum()),
            d,
        )

    @staticmethod
    def sum(pairs: Sequence["Pair"]) -> "Pair":
        """Several pairs as one, as if their rows were of one tensor."""
        return Pair(
            sum(pair.numbers for pair in pairs),
            sum(pair.rows for pair in pairs),
            sum(pair.absolute for pair in pairs),
            largest(*(pair.maximum for pair in pairs)),
            sum(pair.total for pair in pairs),
            sum(pair.squares for pair in pairs),
            sum(pair.squares_of_a for pair in pairs),
            sum(pair.cosines for pair in pairs),
            sum(pair.distances for pair in pairs),
            torch.empty(0),  # rows of different lengths form no matrix
        )

    def difference(
        self, name: str, layer: str, shape: tuple[int, ...], effective_rank: float | None
    ) -> Difference:
        mean = self.total / self.numbers
        return Difference(
            name,
            layer,
            shape,
            mean_absolute=self.absolute / self.numbers,
            maximum=self.maximum,
            standard_deviation=math.sqrt(largest(self.squares / self.numbers - mean**2, 0.0)),
            cosine=self.cosines / self.rows,
            distance=self.distances / self.rows,
            relative=ratio(math.sqrt(self.squares), math.sqrt(self.squares_of_a)),
            effective_rank=effective_rank,
        )

    def effective_rank(self) -> float | None:
        return effective_rank(self.change) if len(self.change) > 1 else None


def row_cosines(a: Tensor, b: Tensor) -> Float[Tensor, " rows"]:
    cosines = torch.nn.functional.cosine_similarity(a, b, dim=1)
    return torch.where((a == b).all(dim=1), 1.0, cosines)  # of two zero vectors, too


def largest(*values: float) -> float:
    """The maximum; NaN if any is NaN, of which Python's `max` takes no notice."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def ratio(change: float, size: float) -> float:
    if size == 0:
        return change * math.inf if change else 0.0  # of NaN it is NaN
    return change / size


def effective_rank(matrix: Float[Tensor, "rows columns"]) -> float:
    """exp(entropy of the singular values over their sum) (Roy and Vetterli 2007); 0 for zeros,
    NaN where one is not finite."""
    if not matrix.isfinite().all():
        return math.nan
    if not matrix.any():
        return 0.0
    singular = torch.linalg.svdvals(matrix.float().cpu()).double()
    shares = singular / singular.sum()
    return float(torch.special.entr(shares).sum().exp())
