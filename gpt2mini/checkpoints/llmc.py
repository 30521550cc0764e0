"""llm.c's checkpoints: `gpt2_124M.bin` and the like, 256 numbers and then all weights end to end.

https://github.com/karpathy/llm.c, train_gpt2.py, `write_model`. The vocabulary is padded to a
multiple of 128; the rows that were added are left out here.
"""

from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt2mini.checkpoints.names import BLOCK, TOP, published_shape, rules
from gpt2mini.checkpoints.stored import (
    Checkpoint,
    CheckpointError,
    StoredTensor,
    reading,
    transposed,
)
from gpt2mini.config import GPT2Config

MAGIC = 20240326
HEADER = 256  # 32-bit integers
# Version of the format -> dtype of the weights. Version 1 has a vocabulary that is not padded.
DTYPES = {1: torch.float32, 3: torch.float32, 5: torch.bfloat16}


def is_llmc(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == MAGIC.to_bytes(4, "little")


def read_llmc(path: Path) -> Checkpoint:
    """The checkpoint of a file that llm.c's train_gpt2.py or train_gpt2.cu wrote."""
    with reading(path):
        header = np.fromfile(path, "<i4", HEADER).tolist()
        _, version, context, vocab, layers, heads, emb, padded, *_ = header
        if version not in DTYPES:
            raise CheckpointError(f"{path} is of version {version}; expected one of {[*DTYPES]}")
        config = GPT2Config(vocab, context, emb, heads, layers)
        rows = vocab if version == 1 else padded
        shapes = stored_shapes(config, rows)
        expected = 4 * HEADER + sum(map(prod, shapes.values())) * DTYPES[version].itemsize
        if rows < vocab or path.stat().st_size != expected:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes; its header asks for {expected:,}"
            )
        weights = read_numbers(path, DTYPES[version])
    tensors: dict[str, StoredTensor] = {}
    first = 0
    for (name, layer), shape in shapes.items():
        tensor = weights[first : first + prod(shape)].view(shape)
        first += prod(shape)
        tensors[name.replace("h.0.", f"h.{layer}.")] = StoredTensor(path, shape, tensor.detach)
    for rule in rules(config):
        if rule.transposed:
            tensors[rule.published] = transposed(tensors[rule.published])
    wte = weights[: rows * emb].view(rows, emb)[:vocab]
    tensors["wte.weight"] = StoredTensor(path, (vocab, emb), wte.detach)
    return Checkpoint(path.parent, config, tensors)


def stored_shapes(config: GPT2Config, rows: int) -> dict[tuple[str, int], tuple[int, ...]]:
    """(name of the first layer's tensor, layer) -> shape, in the order of the file: each tensor of
    all layers side by side. rows: of the token embedding."""
    wte, wpe, *final_norm = TOP
    in_file = [(wte, 0), (wpe, 0)]
    in_file += [(rule, layer) for rule in BLOCK for layer in range(config.n_layers)]
    in_file += [(rule, 0) for rule in final_norm]
    shapes = {}
    for rule, layer in in_file:
        name = rule.published if rule in TOP else f"h.0.{rule.published}"
        shape = published_shape(rule, config, classes=0)
        shapes[name, layer] = shape[::-1] if rule.transposed else shape
    shapes["wte.weight", 0] = (rows, config.emb_dim)
    return shapes


def read_numbers(path: Path, dtype: torch.dtype) -> Tensor:
    """All weights, mapped into memory and not read yet."""
    integers = np.memmap(path, f"<i{dtype.itemsize}", mode="c", offset=4 * HEADER)
    return torch.from_numpy(integers).view(dtype)
