"""LoRA: add low-rank adapters, disable, merge and unmerge them; PEFT's file format."""

from gpt2mini.lora.layers import (
    TARGETS,
    LoRALinear,
    add_lora,
    load_adapter,
    lora_disabled,
    lora_layers,
    merge_lora,
    save_adapter,
    unmerge_lora,
    with_shared_weights,
)

__all__ = [
    "TARGETS",
    "LoRALinear",
    "add_lora",
    "load_adapter",
    "lora_disabled",
    "lora_layers",
    "merge_lora",
    "save_adapter",
    "unmerge_lora",
    "with_shared_weights",
]
