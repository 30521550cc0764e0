"""GGUF files of GPT-2, llama.cpp's format, quantized or not, read by the `gguf` package.

https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py, `GPT2Model`. Linear layers are stored
as ours, (out, in).
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2mini.checkpoints.names import OWN_HEAD, Rule, rules
from gpt2mini.checkpoints.stored import (
    Checkpoint,
    CheckpointError,
    StoredTensor,
    reading,
    transposed,
)
from gpt2mini.config import GPT2Config
from gpt2mini.files import refuse_placeholder

NUMBERS = {  # GGUF's names for the numbers of a GPT-2, and ours
    "gpt2.context_length": "context_length",
    "gpt2.embedding_length": "emb_dim",
    "gpt2.attention.head_count": "n_heads",
    "gpt2.block_count": "n_layers",
}
NAMES = {  # the published parts of a model, and GGUF's
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def read_gguf(path: Path) -> Checkpoint:
    """The checkpoint of a GGUF file. Quantized weights become float32."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise ImportError(
            "reading GGUF needs the gguf package: pip install 'gpt2mini[gguf]'"
        ) from None
    with reading(path):
        refuse_placeholder(path)
        reader = GGUFReader(path)
        found = {tensor.name: tensor for tensor in reader.tensors}
        config = read_fields(path, reader, found)
        if config.n_layers > len(found):
            raise CheckpointError(f"{path}: {len(found)} tensors for {config.n_layers} blocks")

    def read(tensor: Any) -> Tensor:
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())

    names = {gguf_name(rule): rule for rule in rules(config, OWN_HEAD)}
    tensors = {}
    for name, tensor in found.items():
        rule = names.get(name)
        shape = tuple(int(length) for length in reversed(tensor.shape))
        stored = StoredTensor(path, shape, partial(read, tensor))
        tensors[rule.published if rule else name] = (
            transposed(stored) if rule and rule.transposed else stored
        )
    return Checkpoint(path.parent, config, tensors)


def read_fields(path: Path, reader: Any, found: dict[str, Any]) -> GPT2Config:
    architecture = field_of(reader, "general.architecture")
    if architecture != "gpt2":
        raise CheckpointError(f"{path} describes a model of type {architecture!r}; expected 'gpt2'")
    epsilon = field_of(reader, "gpt2.attention.layer_norm_epsilon")
    if epsilon is not None and abs(epsilon - 1e-5) > 1e-8:
        raise CheckpointError(f"{path}: layer_norm_epsilon is {epsilon}; GPT-2 has 1e-5")
    numbers = {ours: field_of(reader, theirs) for theirs, ours in NUMBERS.items()}
    vocab_size = int(found["token_embd.weight"].shape[-1])
    eos_id = field_of(reader, "tokenizer.ggml.eos_token_id")
    is_last = eos_id is None or eos_id >= vocab_size - 1
    return GPT2Config(vocab_size, **numbers, eos_id=None if is_last else eos_id)


def field_of(reader: Any, name: str) -> Any:
    """The value of a field; None if there is none."""
    field = reader.get_field(name)
    return None if field is None else field.contents()


def gguf_name(rule: Rule) -> str:
    """`h.0.attn.c_attn.weight` is `blk.0.attn_qkv.weight` there."""
    part, _, kind = rule.published.rpartition(".")
    if part.startswith("h."):
        _, layer, part = part.split(".", 2)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES[part]}.{kind}"
