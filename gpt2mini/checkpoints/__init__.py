"""Files <-> model: find a model by name or folder, load it, save it.

Read in this order: names, stored, build, huggingface, tensorflow, openai, hub.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gpt2mini.checkpoints.build import build_model
from gpt2mini.checkpoints.config_json import read_class_names
from gpt2mini.checkpoints.hub import find_model
from gpt2mini.checkpoints.huggingface import read_folder, write_folder
from gpt2mini.checkpoints.stored import (
    Checkpoint,
    CheckpointError,
    StoredTensor,
    holds_adapter,
    without_wrappers,
)
from gpt2mini.config import GPT2Config
from gpt2mini.model import GPT2

__all__ = [
    "CheckpointError",
    "find_model",
    "holds_adapter",
    "load_model",
    "model_from_tensors",
    "read_class_names",
    "save_model",
]


def load_model(
    name_or_folder: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> GPT2:
    """A model in eval mode, from a folder (Hugging Face's or OpenAI's) or by its name.

    dtype: of the weights; the default is float32, whatever the files hold. device: the default is
    the CPU.
    Raises FileNotFoundError if there is no such model, ConnectionError if it cannot be downloaded,
    CheckpointError (a ValueError) if its files are damaged or hold something else.
    """
    folder = find_model(name_or_folder)
    if (folder / "hparams.json").is_file() and not (folder / "config.json").is_file():
        # Imported here: only these files need what it needs.
        from gpt2mini.checkpoints.openai import read_openai_folder

        checkpoint = read_openai_folder(folder)
    else:
        checkpoint = read_folder(folder)
    return build_model(checkpoint, dtype or torch.float32, torch.device(device or "cpu"))


def model_from_tensors(
    config: GPT2Config,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    source: str | Path = "tensors",
) -> GPT2:
    """A model in eval mode from tensors under the published names (`wte.weight`,
    `h.0.attn.c_attn.weight`, ...) in the published layout, (in, out): for another file format.

    source: what errors call them. Raises CheckpointError for missing or unknown names and shapes.
    """
    stored = {
        name: StoredTensor(Path(source), tuple(tensor.shape), partial(Tensor.detach, tensor))
        for name, tensor in tensors.items()
    }
    checkpoint = Checkpoint(Path(source), config, without_wrappers(stored))
    return build_model(checkpoint, dtype, torch.device(device))


def save_model(
    model: GPT2,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write a Hugging Face GPT-2 folder, which `transformers` and `load_model` open.

    dtype: of the weights in the file; the default is the model's. class_names: of a classifier, in
    the order of its logits. An interrupted save leaves the old files, whole; a finished one removes
    an adapter from the folder.
    """
    write_folder(model, Path(folder), dtype, class_names)
