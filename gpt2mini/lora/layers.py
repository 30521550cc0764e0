"""The adapted layer (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models").

A trained linear layer W gets a second path of small rank beside it,

    h = W x + b + (alpha / rank) * B A dropout(x)        A: (rank, in), B: (out, rank)

A starts random and B at zero, so at first nothing has changed. Only A and B learn. They are in
float32 on a base of half precision, as PEFT's are: in bfloat16 a step of the optimizer is smaller
than the spacing of most numbers, and they would stay what they are.

Another kind of adapter is a subclass, for `add_lora(model, layer=...)`. It may add parameters in
`__init__`, and overrides `adapted` (what the layer computes) and `merged_weight` (the weight of a
plain layer that computes the same).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2mini.checkpoints.build import Unfilled
from gpt2mini.modes import has_hooks


class LoRALinear(nn.Linear):
    """A linear layer with an adapter beside it. Its own weight keeps its name.

    A is not initialized yet: `add_lora` calls `reset_parameters`, `load_adapter` fills it.
    Raises ValueError for a layer that computes something else than nn.Linear.
    """

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, dropout: float, rank_stabilized: bool
    ) -> None:
        check_plain_linear(base)
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a second weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.rank_stabilized = rank, alpha, rank_stabilized
        self.lora_dropout = nn.Dropout(dropout)
        wide = torch.promote_types(base.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features, dtype=wide))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank, dtype=wide))
        self.enabled = True

    def reset_parameters(self) -> None:
        """Draw a new A, as nn.Linear draws its weight; B = 0."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def scaling(self) -> float:
        """alpha / rank, so that another rank needs no other learning rate; or alpha / sqrt(rank),
        with which large ranks learn more (Kalajdzievski 2023, rsLoRA)."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def forward(self, input: Float[Tensor, "*axes into"]) -> Float[Tensor, "*axes out"]:
        return self.adapted(input) if self.enabled else super().forward(input)

    def adapted(self, input: Float[Tensor, "*axes into"]) -> Float[Tensor, "*axes out"]:
        """The sum is taken in the wider dtype of the adapter, and given in the base's."""
        base = super().forward(input)  # (*axes, out)
        wide = self.lora_dropout(input.to(self.lora_A.dtype))
        low = F.linear(wide, self.lora_A) * self.scaling  # (*axes, rank)
        return (base + F.linear(low, self.lora_B)).to(base.dtype)

    def merged_weight(self) -> Float[Tensor, "out into"]:
        """W + scaling * B A, added up in float32 or better."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        change = self.lora_B.to(wide) @ self.lora_A.to(wide) * self.scaling
        return (self.weight.to(wide) + change).to(self.weight.dtype)


def check_plain_linear(layer: nn.Module) -> None:
    """Raise ValueError for a layer whose own computation would be lost when it is replaced."""
    hooks = has_hooks(layer)
    if type(layer) is not nn.Linear or hooks or "forward" in vars(layer):
        raise ValueError(
            f"{layer} cannot be adapted: LoRA takes the place of a plain nn.Linear, and this layer "
            f"has {'forward hooks' if hooks else 'a forward of its own'}, which would be lost"
        )


def linear_layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with the given parameters, without the random initialization of nn.Linear."""
    with Unfilled(weight.dtype):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = weight
    layer.bias = bias  # type: ignore[assignment]
    return layer
