"""Low-rank adapters: train a fraction of a percent of a model, keep the rest as it is.

add_lora(model, rank=8)          # then train as usual; everything else is frozen
with lora_disabled(model): ...   # the base model, exactly
merge_lora(model)                # W + (alpha / rank) B A, in a plain model: no cost any more
unmerge_lora(model)              # and back, bit for bit
add_lora(model)                  # after merge_lora: a new adapter, the merged weights are its base
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from gpt2mini.lora.layers import LoRALinear, linear_layer
from gpt2mini.lora.named import (
    Layers,
    adapters_of,
    forget_adapters,
    lora_layers,
    merged_layers,
    replace_layer,
    set_adapter,
    take_out,
)
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


@torch.inference_mode(False)  # whose parameters could not be trained
def add_lora(
    model: GPT2,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: Sequence[str] = ("query", "value"),
    rank_stabilized: bool = False,
    layer: type[LoRALinear] = LoRALinear,
    name: str = "default",
) -> None:
    """Give every block adapters, in place, and freeze everything else.

    targets: among query, key, value, attn_out, mlp_in, mlp_out. A head of your own is frozen too:
    set its `requires_grad` afterwards if it is to be trained as well. Whatever else you unfreeze
    learns in the base too, so PPO and GRPO then need `reference=deepcopy(model)`.
    layer: another kind of adapter; see `gpt2mini.lora.layers`.
    name: to tell it from others on the same base; the new one is active (`set_adapter`). After
    `merge_lora` the merged weights are the base, and earlier adapters are let go.
    Raises ValueError, and leaves the model as it was, for unknown targets, tied tensors, settings
    out of range, a layer that is not a plain nn.Linear, or a name that is taken.
    """
    check_targets(targets)
    check_adapter_settings(rank, alpha, dropout)
    check_name_is_free(model, name)
    adapted: dict[str, LoRALinear] = {}
    for i in range(model.config.n_layers):
        for target in targets:
            path = f"trf_blocks.{i}.{TARGETS[target]}"
            base: Any = plain_layer(model, path)
            adapted[path] = layer(base, rank, alpha, dropout, rank_stabilized)
            adapted[path].reset_parameters()
    insert_adapter(model, adapted, name)


def plain_layer(model: GPT2, path: str) -> nn.Module:
    """A layer of the base: what lies under an adapter, if there is one."""
    layer = model.get_submodule(path)
    return linear_layer(layer.weight, layer.bias) if isinstance(layer, LoRALinear) else layer


def insert_adapter(model: GPT2, layers: Layers, name: str) -> None:
    """Freeze the model, then put the adapted layers in the place of its own."""
    if merged_layers(model):
        forget_adapters(model)
    take_out(model)
    for parameter in model.parameters():
        parameter.requires_grad = False
    adapters_of(model)[name] = layers
    set_adapter(model, name)


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


def check_adapter_settings(rank: int, alpha: float, dropout: float) -> None:
    if not isinstance(rank, int) or rank < 1 or not 0 < alpha < math.inf:
        raise ValueError(
            "rank must be at least 1 and alpha above 0, an integer and a finite number, "
            f"not {rank!r} and {alpha!r}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout!r}")


def adapter_parameters(model: GPT2) -> set[str]:
    """Names of the parameters that the adapters have beside the base model's."""
    return {
        f"{layer_name}.{name}"
        for layer_name, layer in lora_layers(model).items()
        for name, _ in layer.named_parameters()
        if name not in ("weight", "bias")
    }


def trainable_beside_adapters(model: GPT2) -> list[str]:
    """Names of the trainable parameters that are no adapter's."""
    adapters, parameters = adapter_parameters(model), model.named_parameters()
    return [name for name, p in parameters if p.requires_grad and name not in adapters]


def check_name_is_free(model: GPT2, name: str) -> None:
    refuse_quantized(model, "an adapter")
    if name in adapters_of(model) and not merged_layers(model):
        raise ValueError(
            f"the model has adapters already, one of them called {name!r}: to build on it, "
            "merge_lora(model) first; to keep both, give the new one a name (name=...); to replace "
            "it, load the base again"
        )


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
    """Replace the adapted layers, in place, by linear layers with their `merged_weight`: a plain
    GPT-2, as fast as one, which `save_pretrained` writes. `unmerge_lora` takes it back.

    The sum is taken in float32 and rounded to the base's dtype: a base in half precision loses what
    is smaller than half the spacing of its numbers. To keep it, load the base in float32, merge,
    and save with `save_pretrained(folder, dtype="bfloat16")` if at all.
    """
    layers = lora_layers(model)
    if not layers:
        merged = " (it is merged already)" if merged_layers(model) else ""
        raise ValueError(f"the model has no adapter to merge{merged}")
    if not all(layer.enabled for layer in layers.values()):
        raise ValueError("the adapters are switched off: merge them outside of lora_disabled")
    for name, layer in layers.items():
        plain = linear_layer(nn.Parameter(layer.merged_weight(), requires_grad=False), layer.bias)
        plain._unmerged = (layer,)  # type: ignore[assignment] # a tuple hides it from nn.Module
        replace_layer(model, name, plain.train(layer.training))


def unmerge_lora(model: GPT2) -> None:
    """Put the adapted layers back as they were before `merge_lora`, bit for bit."""
    layers = merged_layers(model)
    if not layers:
        raise ValueError("the model has no merged adapter")
    for name, plain in layers.items():
        (layer,) = plain._unmerged  # type: ignore[misc]
        layer.to(plain.weight.device)
        layer.weight.data = layer.weight.data.to(plain.weight.dtype)
        replace_layer(model, name, layer.train(plain.training))


def with_shared_weights(model: GPT2) -> GPT2:
    """A second model on the same weights, to which adapters and a head of its own can be added, so
    that one base in memory serves as policy, reference and reward model. Adapters, heads and
    `requires_grad` of the one model do not change the other."""
    refuse_quantized(model, "sharing")
    if lora_layers(model) or merged_layers(model):
        raise ValueError("the model has adapters already: share its weights before they are added")
    shared = {
        id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return deepcopy(model, shared)
