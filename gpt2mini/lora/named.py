"""Several adapters on one base, by name, of which one is active: the one that stands in the model.

The layers of the others are kept beside the model. They are in no `parameters()` and no state dict,
so they do not learn, and `save_adapter` and `merge_lora` mean the active one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gpt2mini.lora.layers import LoRALinear, linear_layer
from gpt2mini.model import GPT2

Layers = dict[str, LoRALinear]  # an adapter: its layers by their names in the model


def adapters_of(model: GPT2) -> dict[str, Layers]:
    """Every adapter of a model by its name."""
    return vars(model).setdefault("_adapters", {})


def adapter_names(model: GPT2) -> list[str]:
    """The names of a model's adapters, in the order in which they were added."""
    return list(adapters_of(model))


def active_adapter(model: GPT2) -> str | None:
    """The name of the adapter that stands in the model; None: there is none, or it is merged."""
    present = set(lora_layers(model).values())
    return next(
        (n for n, layers in adapters_of(model).items() if present & {*layers.values()}), None
    )


def set_adapter(model: GPT2, name: str) -> None:
    """Make an adapter the active one, in place.

    Make the optimizer afterwards: its parameters are the active adapter's.
    Raises ValueError if there is none of that name, or if an adapter is merged.
    """
    if merged_layers(model):
        raise ValueError("the adapter is merged: unmerge_lora(model) before another is chosen")
    if name not in adapters_of(model):
        raise ValueError(
            f"the model has no adapter {name!r}; it has {adapter_names(model) or 'none'}: "
            "load_adapter(model, folder, name=...) or add_lora(model, name=...)"
        )
    take_out(model)
    for path, layer in adapters_of(model)[name].items():
        put_in(model, path, layer)


@contextmanager
def using_adapter(model: GPT2, name: str) -> Iterator[None]:
    """Inside, another adapter is active: the reference of DPO beside the adapter that learns."""
    before = active_adapter(model)
    set_adapter(model, name)
    try:
        yield
    finally:
        if before is not None:
            set_adapter(model, before)


def take_out(model: GPT2) -> None:
    """Put plain layers, with the base's weights, in the place of the active adapter's."""
    for path, layer in lora_layers(model).items():
        replace_layer(model, path, linear_layer(layer.weight, layer.bias).train(layer.training))


def put_in(model: GPT2, path: str, layer: LoRALinear) -> None:
    """Put an adapted layer in the place of a plain one, on its device and in its mode."""
    base = model.get_submodule(path)
    assert isinstance(base, nn.Linear)
    layer.weight, layer.bias = base.weight, base.bias  # the model may have been moved
    replace_layer(model, path, layer.to(base.weight.device).train(base.training))


def replace_layer(model: GPT2, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def lora_layers(model: GPT2) -> Layers:
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


def forget_adapters(model: GPT2) -> None:
    """Make the weights as they are now the base: what is merged cannot be unmerged any more, and
    adapters of the earlier base are let go."""
    for layer in merged_layers(model).values():
        del layer._unmerged
    adapters_of(model).clear()
