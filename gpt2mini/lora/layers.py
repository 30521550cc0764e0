"""Low-rank adapters: train a fraction of a percent of a model, keep the rest as it is.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models": a trained linear layer W gets
a second path of small rank beside it,

    h = W x + b + (alpha / rank) * B A dropout(x)        A: (rank, in), B: (out, rank)

A starts random and B at zero, so at first nothing has changed. Only A and B learn.

    add_lora(model, rank=8)          # then train as ever; everything else is frozen
    with lora_disabled(model): ...   # the base model, exactly
    merge_lora(model)                # W + (alpha / rank) B A, in a plain model: no cost any more
    unmerge_lora(model)              # and back, bit for bit

    save_adapter(model, folder)      # in PEFT's file format; load_adapter reads it, and PEFT's own
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2mini.checkpoints.build import Unfilled
from gpt2mini.model import GPT2
from gpt2mini.quantized_layers import refuse_quantized

# What can have an adapter, and where it is in a block.
TARGETS = {
    "query": "attn.query",
    "key": "attn.key",
    "value": "attn.value",
    "attn_out": "attn.attn_out",
    "mlp_in": "mlp.mlp_in",
    "mlp_out": "mlp.mlp_out",
}


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


def add_lora(
    model: GPT2,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: Sequence[str] = ("query", "value"),
    rank_stabilized: bool = False,
) -> None:
    """Give every block adapters, in place, and freeze everything else.

    targets: among query, key, value, attn_out, mlp_in, mlp_out. A head of your own is frozen too:
    set its `requires_grad` afterwards if it is to learn along.
    Raises ValueError, and leaves the model as it was, for unknown targets, tied tensors, impossible
    numbers, or a model that has adapters already.
    """
    check_targets(targets)
    check_numbers(rank, alpha, dropout)
    refuse_adapters(model)
    for parameter in model.parameters():
        parameter.requires_grad = False
    for block in model.trf_blocks:
        for target in targets:
            base = block.get_submodule(TARGETS[target])
            assert isinstance(base, nn.Linear)
            adapted = LoRALinear(base, rank, alpha, dropout, rank_stabilized)
            nn.init.kaiming_uniform_(adapted.lora_A, a=math.sqrt(5))  # as nn.Linear's own weights
            replace_layer(block, TARGETS[target], adapted.train(base.training))


def check_targets(targets: Sequence[str]) -> None:
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets must be a list of names among {', '.join(TARGETS)}")
    for target in targets:
        if target in ("tok_emb", "out_head", "wte", "lm_head"):
            raise ValueError(
                f"{target} can have no adapter: embedding and output head are one tensor, so a "
                "change made for the one would change the other; give the model a head of its own "
                "(model.out_head = nn.Linear(...)) and train that"
            )
        if target not in TARGETS:
            raise ValueError(f"unknown target {target!r}: choose among {', '.join(TARGETS)}")


def check_numbers(rank: int, alpha: float, dropout: float) -> None:
    if not isinstance(rank, int) or rank < 1 or not 0 < alpha < math.inf:
        raise ValueError(
            "rank must be at least 1 and alpha above 0, a whole number and a finite one, "
            f"not {rank!r} and {alpha!r}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout!r}")


def linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A linear layer of given parameters; no random number is drawn for it."""
    with Unfilled(weight.dtype):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = weight
    layer.bias = bias  # type: ignore[assignment]
    return layer


def replace_layer(block: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, layer)


def lora_layers(model: GPT2) -> dict[str, LoRALinear]:
    """The layers with adapters by their names, `trf_blocks.0.attn.query` and so on."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)
    }


def merged_layers(model: GPT2) -> dict[str, nn.Linear]:
    """The layers that `merge_lora` has put in the place of adapted ones."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and hasattr(module, "_unmerged")
    }


def refuse_adapters(model: GPT2) -> None:
    refuse_quantized(model, "an adapter")
    if lora_layers(model) or merged_layers(model):
        raise ValueError("the model has adapters already: one set at a time")


@contextmanager
def lora_disabled(model: GPT2) -> Iterator[None]:
    """Inside, the model is its base, exactly: the reference of DPO and PPO, without a copy of it.

    Raises ValueError if there is no adapter, or if it is merged.
    """
    layers = lora_layers(model)
    if not layers:
        merged = "is merged: unmerge_lora(model) first" if merged_layers(model) else "is not there"
        raise ValueError(f"an adapter that {merged} cannot be disabled")
    before = {name: layer.enabled for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.enabled = False
        yield
    finally:
        for name, layer in layers.items():
            layer.enabled = before[name]


@torch.no_grad()
def merge_lora(model: GPT2) -> None:
    """Add the adapters to the weights, in place: what is left is a plain GPT-2, as fast as one, and
    `save_pretrained` writes it as one. `unmerge_lora` takes it back."""
    layers = lora_layers(model)
    if not layers:
        merged = " (it is merged already)" if merged_layers(model) else ""
        raise ValueError(f"the model has no adapter to merge{merged}")
    if not all(layer.enabled for layer in layers.values()):
        raise ValueError("the adapters are switched off: merge them outside of lora_disabled")
    for name, layer in layers.items():
        plain = linear(nn.Parameter(layer.merged_weight(), requires_grad=False), layer.bias)
        plain._unmerged = (layer,)  # type: ignore[assignment] # a tuple hides it from nn.Module
        replace_layer(model, name, plain.train(layer.training))


def unmerge_lora(model: GPT2) -> None:
    """Put the adapted layers back as they were before `merge_lora`, bit for bit."""
    layers = merged_layers(model)
    if not layers:
        raise ValueError("the model has no merged adapter")
    for name, plain in layers.items():
        (layer,) = plain._unmerged  # type: ignore[misc]
        layer.to(plain.weight.device, plain.weight.dtype)
        replace_layer(model, name, layer.train(plain.training))


def with_shared_weights(model: GPT2) -> GPT2:
    """A second model on the same weights, to which adapters and a head of its own can be added: one
    base in memory serves as policy, as its reference, and as reward model. What one of them trains
    or loads beside the weights, and what it freezes, the other does not see.
    """
    refuse_adapters(model)
    shared = {
        id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return deepcopy(model, shared)


def save_adapter(model: GPT2, folder: str | Path, replace: bool = False) -> None:
    """Write adapters, and a head that was trained along, to a folder of their own; see
    `gpt2mini.lora.peft_format.write_adapter`."""
    from gpt2mini.lora.peft_format import write_adapter

    write_adapter(model, Path(folder), replace)


def load_adapter(model: GPT2, folder: str | Path) -> None:
    """Add the adapters of a folder to a model; see `gpt2mini.lora.peft_format.read_adapter`."""
    from gpt2mini.lora.peft_format import read_adapter

    read_adapter(model, Path(folder))
