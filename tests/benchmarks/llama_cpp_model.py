"""llama.cpp as a peer of generation.py: our weights in a GGUF file, decoded through its C API.

Needs `pip install llama-cpp-python gguf`; the first is built with a C++ compiler on the machine.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpt2mini import GPT2
from gpt2mini.model import TiedHead, TransformerBlock

FORMATS = {"fp32": "F32", "fp16": "F16", "int8": "Q8_0", "int4": "Q4_0"}  # ours and GGUF's


def write_gguf(model: GPT2, path: Path, precision: str) -> None:
    """Matrices in the format; norms, biases and positions in float32, as llama.cpp's own
    converter writes them. Without a vocabulary: the file serves ids alone."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.emb_dim)
    writer.add_feed_forward_length(4 * config.emb_dim)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    kind = gguf.GGMLQuantizationType[FORMATS[precision]]
    for name, tensor in named_tensors(model).items():
        whole = tensor.ndim == 1 or name == "position_embd.weight"
        dtype = gguf.GGMLQuantizationType.F32 if whole else kind
        data = gguf.quants.quantize(tensor.detach().float().contiguous().numpy(), dtype)
        writer.add_tensor(name, data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def named_tensors(model: GPT2) -> dict[str, Tensor]:
    """GGUF's names and our parameters, linear layers as (out, in) on both sides."""
    head = model.out_head
    assert isinstance(head, TiedHead | nn.Linear)
    tensors: dict[str, Tensor] = {
        "token_embd.weight": model.tok_emb.weight,
        "position_embd.weight": model.pos_emb.weight,
        "output_norm.weight": model.final_norm.weight,
        "output_norm.bias": model.final_norm.bias,
        "output.weight": head.weight,
    }
    for layer, block in enumerate(model.trf_blocks):
        assert isinstance(block, TransformerBlock)
        parts: dict[str, Any] = {
            "attn_norm": block.norm1,
            "ffn_norm": block.norm2,
            "attn_output": block.attn.attn_out,
            "ffn_up": block.mlp.mlp_in,
            "ffn_down": block.mlp.mlp_out,
        }
        query_key_value = (block.attn.query, block.attn.key, block.attn.value)
        for kind in ("weight", "bias"):
            tensors |= {f"blk.{layer}.{name}.{kind}": getattr(p, kind) for name, p in parts.items()}
            joined = torch.cat([getattr(part, kind) for part in query_key_value])
            tensors[f"blk.{layer}.attn_qkv.{kind}"] = joined
    return tensors


def load(path: Path, threads: int, longest: int) -> Callable[[Tensor, int], Tensor]:
    """A function that continues each row of ids, (batch, tokens), by so many of the most likely
    ids, and gives the new ones, (batch, new). Batches of several rows are one `llama_batch`."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def write(rows: Tensor, tokens: int) -> Tensor:
        batch_size, prompt = rows.shape
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = batch_size * longest, batch_size
        settings.n_batch = settings.n_ubatch = max(512, batch_size * prompt)
        settings.n_threads = settings.n_threads_batch = threads
        context = llama_cpp.llama_init_from_model(model, settings)
        batch = llama_cpp.llama_batch_init(batch_size * prompt, 0, 1)
        new, columns = rows, range(prompt)
        written = []
        for _ in range(tokens):
            fill(batch, new.numpy(), columns)
            if llama_cpp.llama_decode(context, batch) != 0:
                raise RuntimeError("llama_decode failed")
            last = range(len(columns) - 1, batch.n_tokens, len(columns))
            new = torch.tensor([[argmax(context, i, vocab)] for i in last])  # (batch, 1)
            written.append(new)
            columns = range(columns.stop, columns.stop + 1)
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        return torch.cat(written, dim=1)

    def argmax(context: Any, position: int, vocab: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, position)
        return int(np.ctypeslib.as_array(logits, (vocab,)).argmax())

    write.quiet = quiet  # type: ignore[attr-defined]  # C calls it as long as anything is written
    return write


def fill(batch: Any, rows: np.ndarray, columns: range) -> None:
    """Row after row; logits are asked for at the last column of each."""
    batch.n_tokens = rows.size
    for row, ids in enumerate(rows):
        for column, token in zip(columns, ids, strict=True):
            i = row * len(columns) + column - columns.start
            batch.token[i], batch.pos[i] = int(token), column
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = column == columns[-1]
