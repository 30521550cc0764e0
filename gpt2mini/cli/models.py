"""The model that a job looks at: --model, and --adapter if one is given."""

import torch

from gpt2mini import GPT2, Tokenizer
from gpt2mini.lora import load_adapter, merge_lora


def load(
    model: str, adapter: str | None = None, device: torch.device | str | None = None
) -> tuple[GPT2, Tokenizer]:
    """The model and its tokenizer; the adapter is merged, as fast as none."""
    found = GPT2.from_pretrained(model, device=device)
    if adapter:
        load_adapter(found, adapter)
        merge_lora(found)
    return found, Tokenizer.from_pretrained(model)


def describe(model: str, adapter: str | None) -> str:
    """For headings."""
    return f"{model} with the adapter {adapter}" if adapter else model
