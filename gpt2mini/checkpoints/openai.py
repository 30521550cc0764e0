"""OpenAI's own folders: hparams.json and a TensorFlow checkpoint."""

import re
from dataclasses import replace
from pathlib import Path

from gpt2mini.checkpoints.names import openai_name, rules
from gpt2mini.checkpoints.origin import Origin
from gpt2mini.checkpoints.stored import (
    Checkpoint,
    CheckpointError,
    StoredTensor,
    file_beside,
    reading,
)
from gpt2mini.checkpoints.tensorflow import read_bundle
from gpt2mini.config import GPT2Config
from gpt2mini.files import read_json

# OpenAI's names for the numbers of a GPT-2, and ours.
HPARAMS = {
    "n_vocab": "vocab_size",
    "n_ctx": "context_length",
    "n_embd": "emb_dim",
    "n_head": "n_heads",
    "n_layer": "n_layers",
}
OPTIMIZER_STATE = re.compile(r"(?!model/)|.*/Adam(_1)?$")  # left in by some who fine-tuned


def read_openai_folder(folder: Path) -> Checkpoint:
    """The checkpoint of a folder with `hparams.json` and a TensorFlow bundle."""
    path = folder / "hparams.json"
    with reading(path):
        hparams = read_json(path)
        if not isinstance(hparams, dict) or not hparams.keys() >= HPARAMS.keys():
            raise CheckpointError(f"{path}: expected an object with {', '.join(HPARAMS)}")
        config = GPT2Config(**{ours: hparams[theirs] for theirs, ours in HPARAMS.items()})
        others = {name: value for name, value in hparams.items() if name not in HPARAMS}
    index = find_index(folder)
    bundle = read_bundle(index)
    if config.n_layers > len(bundle):
        raise CheckpointError(
            f"{path}: n_layer is {config.n_layers}; {index} has only {len(bundle)} tensors"
        )
    published = {openai_name(rule.published): rule.published for rule in rules(config)}
    tensors = {}
    for name, tensor in bundle.items():
        if OPTIMIZER_STATE.match(name):
            continue
        if len(tensor.shape) == 3 and tensor.shape[0] == 1:
            tensor = without_first_axis(tensor)
        tensors[published.get(name, name)] = tensor
    return Checkpoint(folder, config, tensors, origin=Origin(settings=others))


def without_first_axis(tensor: StoredTensor) -> StoredTensor:
    """OpenAI's linear layers are convolutions of width 1, and their weights (1, in, out)."""
    return replace(tensor, shape=tensor.shape[1:], read=lambda: tensor.read()[0])


def find_index(folder: Path) -> Path:
    """The index of the bundle that the file `checkpoint` names, or of the only one there."""
    path = folder / "checkpoint"
    if path.is_file():
        with reading(path):
            named = re.search(
                r'^model_checkpoint_path: "(.*)"', path.read_text(encoding="utf-8"), re.MULTILINE
            )
            if not named:
                raise CheckpointError(f"{path} names no checkpoint (model_checkpoint_path)")
            return file_beside(path, re.split(r"[/\\]", named[1])[-1] + ".index")
    found = sorted(folder.glob("*.index"))
    if len(found) != 1:
        raise CheckpointError(f"{folder} has {len(found)} bundles (*.index); expected one")
    return found[0]
