"""Files <-> model: find a model by name or folder, load it, save it."""

from pathlib import Path

import torch

from gpt2mini.checkpoints.hub import find_model
from gpt2mini.checkpoints.huggingface import read_model, write_model
from gpt2mini.model import GPT2

__all__ = ["find_model", "load_model", "save_model"]


def load_model(
    name_or_folder: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> GPT2:
    """A model in eval mode, from a folder or by its name.

    dtype: of the weights; the default is float32. device: the default is the CPU.
    Raises FileNotFoundError if there is no such model, ValueError if its files are damaged.
    """
    return read_model(find_model(name_or_folder), dtype, torch.device(device or "cpu"))


def save_model(model: GPT2, folder: str | Path) -> None:
    """Write a Hugging Face GPT-2 folder, which `transformers` and `load_model` open."""
    write_model(model, Path(folder))
