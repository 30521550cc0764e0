"""nanoGPT's checkpoints: `ckpt.pt`, weights and training state in one file of `torch.save`.

https://github.com/karpathy/nanoGPT, train.py and model.py. Its linear layers are stored as ours,
(out, in). With `bias=False` it has no biases, which are zeros here.

It computes the exact form of GELU since May 17, 2023 (its commit 594068e7), and before that the
tanh form, which no file says. A file from before January 27, 2023 has no `bias` in model_args, and
is read with the tanh form; all others with the exact one. To correct that for one of the months
between, convert it and set "activation_function": "gelu_new" in its config.json.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2mini.checkpoints.config_json import find_eos_id
from gpt2mini.checkpoints.names import published_shape, rules
from gpt2mini.checkpoints.stored import (
    Checkpoint,
    CheckpointError,
    StoredTensor,
    load_torch_file,
    reading,
    transposed,
    without_wrappers,
)
from gpt2mini.config import GPT2Config
from gpt2mini.files import refuse_placeholder

MODEL_ARGS = {  # nanoGPT's names for the numbers of a GPT-2, and ours
    "vocab_size": "vocab_size",
    "block_size": "context_length",
    "n_embd": "emb_dim",
    "n_head": "n_heads",
    "n_layer": "n_layers",
}


def read_nanogpt(path: Path) -> Checkpoint:
    """The checkpoint of a file that nanoGPT's train.py wrote."""
    with reading(path):
        refuse_placeholder(path)
        contents = load_torch_file(path, mmap=True)
        if not isinstance(contents, dict) or not {"model", "model_args"} <= contents.keys():
            raise CheckpointError(
                f"{path} is no checkpoint of nanoGPT (model and model_args); a state dict alone "
                "belongs into a folder with its config.json, as pytorch_model.bin"
            )
        config = read_model_args(contents["model_args"])
        stored = {name: as_stored(path, tensor) for name, tensor in contents["model"].items()}
    tensors = without_wrappers(stored)
    if config.n_layers > len(tensors):
        raise CheckpointError(
            f"{path} has only {len(tensors)} tensors for {config.n_layers} blocks"
        )
    has_biases = contents["model_args"].get("bias", True)
    for rule in rules(config):
        name = rule.published
        if name in tensors and rule.transposed:
            tensors[name] = transposed(tensors[name])
        elif name not in tensors and name.endswith(".bias") and not has_biases:
            zeros = torch.zeros(published_shape(rule, config, classes=0))
            tensors[name] = as_stored(path, zeros)
    return Checkpoint(path.parent, config, tensors)


def read_model_args(model_args: dict[str, Any]) -> GPT2Config:
    numbers = {ours: model_args[theirs] for theirs, ours in MODEL_ARGS.items()}
    gelu = "none" if "bias" in model_args else "tanh"
    return GPT2Config(**numbers, gelu=gelu, eos_id=find_eos_id({}, numbers["vocab_size"]))


def as_stored(path: Path, tensor: Tensor) -> StoredTensor:
    return StoredTensor(path, tuple(tensor.shape), tensor.detach)
