"""Files <-> model: find a model by name or folder, load it, save it.

Read in this order: names, stored, build, huggingface, tensorflow, openai, nanogpt,
llmc, gguf, hub.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gpt2mini.checkpoints.build import build_model
from gpt2mini.checkpoints.config_json import read_class_names
from gpt2mini.checkpoints.hub import base_name, find_model
from gpt2mini.checkpoints.huggingface import read_folder, write_folder
from gpt2mini.checkpoints.single_files import find_single_file, read_single_file
from gpt2mini.checkpoints.stored import (
    Checkpoint,
    CheckpointError,
    StoredTensor,
    holds_adapter,
    without_wrappers,
)
from gpt2mini.checkpoints.tokenizer_config import complete_tokenizer_config
from gpt2mini.config import GPT2Config
from gpt2mini.device import weight_device, weight_dtype
from gpt2mini.files import local_path
from gpt2mini.model import GPT2
from gpt2mini.modes import uncompiled

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
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
) -> GPT2:
    """A model in eval mode, from a folder (Hugging Face's or OpenAI's), from a file of nanoGPT, of
    llm.c or in GGUF, or by its name.

    dtype: of the weights, a torch.dtype or its name; the default is float32, whatever the files
    hold. device: a torch.device, its name, or the number of an accelerator; the default is the CPU.
    Raises FileNotFoundError if there is no such model, ConnectionError if it cannot be downloaded,
    CheckpointError (a ValueError) if its files are damaged or hold something else, ValueError for a
    dtype that weights cannot have, or a device that is not there.
    """
    dtype = weight_dtype(torch.float32 if dtype is None else dtype)
    device = weight_device("cpu" if device is None else device)
    folder = find_model(name_or_folder)
    if file := find_single_file(local_path(name_or_folder)):
        checkpoint = read_single_file(file)
    elif (folder / "hparams.json").is_file() and not (folder / "config.json").is_file():
        # Imported here: only these files need what it needs.
        from gpt2mini.checkpoints.openai import read_openai_folder

        checkpoint = read_openai_folder(folder)
    else:
        checkpoint = read_folder(folder)
    origin = replace(checkpoint.origin, base=base_name(name_or_folder, folder))
    return build_model(replace(checkpoint, origin=origin), dtype, device)


def model_from_tensors(
    config: GPT2Config,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str | int = "cpu",
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
    return build_model(checkpoint, weight_dtype(dtype), weight_device(device))


def save_model(
    model: GPT2,
    folder: str | Path,
    dtype: torch.dtype | str | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write a Hugging Face GPT-2 folder, which `transformers` and `load_model` open.

    dtype: of the weights in the file; the default is the model's. class_names: of a classifier, in
    the order of its logits. An interrupted save leaves the old files, whole; a finished one removes
    an adapter from the folder.
    """
    folder = local_path(folder)
    write_folder(uncompiled(model), folder, dtype, class_names)
    complete_tokenizer_config(folder)
