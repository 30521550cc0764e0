"""LoRA: add low-rank adapters, disable, merge and unmerge them; PEFT's file format."""

from gpt2mini.lora.adapt import (
    TARGETS,
    add_lora,
    lora_disabled,
    merge_lora,
    unmerge_lora,
    with_shared_weights,
)
from gpt2mini.lora.layers import LoRALinear
from gpt2mini.lora.loading import load_adapter
from gpt2mini.lora.named import (
    active_adapter,
    adapter_names,
    lora_layers,
    set_adapter,
    using_adapter,
)
from gpt2mini.lora.saving import save_adapter

__all__ = [
    "TARGETS",
    "LoRALinear",
    "active_adapter",
    "adapter_names",
    "add_lora",
    "load_adapter",
    "lora_disabled",
    "lora_layers",
    "merge_lora",
    "save_adapter",
    "set_adapter",
    "unmerge_lora",
    "using_adapter",
    "with_shared_weights",
]
