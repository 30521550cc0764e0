"""The adapted layer (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models").

A trained linear layer W gets a second path of small rank beside it,

    h = W x + b + (alpha / rank) * B A dropout(x)        A: (rank, in), B: (out, rank)

A starts random and B at zero, so at first nothing has changed. Only A and B learn.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2mini.checkpoints.build import Unfilled


class LoRALinear(nn.Linear):
    """A linear layer with an adapter beside it. Its own weight keeps its name, and is frozen.

    A is not filled yet: `add_lora` draws it, `load_adapter` reads it.
    """

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, dropout: float, rank_stabilized: bool
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: the weight is there already
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.rank_stabilized = rank, alpha, rank_stabilized
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.enabled = True

    @property
    def scaling(self) -> float:
        """alpha / rank, so that a change of rank asks for no other learning rate; or alpha /
        sqrt(rank), with which large ranks learn more (Kalajdzievski 2023, rsLoRA)."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def forward(self, input: Float[Tensor, "*axes into"]) -> Float[Tensor, "*axes out"]:
        output = F.linear(input, self.weight, self.bias)
        if not self.enabled:
            return output
        low = F.linear(self.lora_dropout(input), self.lora_A) * self.scaling  # (*axes, rank)
        return output + F.linear(low, self.lora_B)

    def merged_weight(self) -> Float[Tensor, "out into"]:
        """W + scaling * B A, added up in float32 or better."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        change = self.lora_B.to(wide) @ self.lora_A.to(wide) * self.scaling
        return (self.weight.to(wide) + change).to(self.weight.dtype)


def linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A linear layer of given parameters; no random number is drawn for it."""
    with Unfilled(weight.dtype):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = weight
    layer.bias = bias  # type: ignore[assignment]
    return layer
