"""Models of other projects in one file: nanoGPT, llm.c, GGUF, and state dicts under a key."""

import json
import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import run
from conftest import TINY, enlarge, random_ids
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from gpt2mini import GPT2, GPT2Config
from gpt2mini.checkpoints import CheckpointError
from gpt2mini.checkpoints.names import rules, to_published
from gpt2mini.cli import main

gguf = pytest.importorskip("gguf")
ids = random_ids(2, 20)


def logits(model: GPT2, token_ids: Tensor = ids) -> Tensor:
    with torch.no_grad():
        return model(token_ids)


def same_layout(model: GPT2) -> dict[str, Tensor]:
    """The published tensors, linear layers as (out, in)."""
    published = to_published(model.state_dict(), model.config)
    turned = {rule.published for rule in rules(model.config) if rule.transposed}
    return {n: t.T.contiguous() if n in turned else t for n, t in published.items()}


# ---- nanoGPT


class NanoGPT(nn.Module):
    """Its model.py, written anew: exact GELU, biases only if `bias`."""

    def __init__(self, vocab: int, context: int, emb: int, heads: int, layers: int, bias: bool):
        super().__init__()
        self.heads = heads

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(emb, bias=bias)

        def block() -> nn.ModuleDict:
            attn = {"c_attn": nn.Linear(emb, 3 * emb, bias), "c_proj": nn.Linear(emb, emb, bias)}
            mlp = {"c_fc": nn.Linear(emb, 4 * emb, bias), "c_proj": nn.Linear(4 * emb, emb, bias)}
            parts = {"ln_1": norm(), "attn": nn.ModuleDict(attn)}
            return nn.ModuleDict(parts | {"ln_2": norm(), "mlp": nn.ModuleDict(mlp)})

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, emb),
                "wpe": nn.Embedding(context, emb),
                "h": nn.ModuleList([block() for _ in range(layers)]),
                "ln_f": norm(),
            }
        )
        self.lm_head = nn.Linear(emb, vocab, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        parts: Any = self.transformer
        x = parts.wte(token_ids) + parts.wpe(torch.arange(token_ids.shape[1]))
        for block in parts.h:
            projected = block.attn.c_attn(block.ln_1(x)).chunk(3, dim=2)
            q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in projected)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
        return self.lm_head(parts.ln_f(x))


def save_nanogpt(path: Path, bias: bool, prefix: str = "") -> NanoGPT:
    torch.manual_seed(0)
    theirs = NanoGPT(211, 64, 48, 6, 3, bias)
    enlarge(theirs)
    model_args = {"n_layer": 3, "n_head": 6, "n_embd": 48, "block_size": 64, "bias": bias}
    contents = {
        "model": {prefix + name: tensor for name, tensor in theirs.state_dict().items()},
        "optimizer": torch.optim.AdamW(theirs.parameters()).state_dict(),
        "model_args": model_args | {"vocab_size": 211, "dropout": 0.1},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare", "learning_rate": 1e-3},
    }
    torch.save(contents, path)
    return theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt_s_checkpoint_computes_what_nanogpt_does(
    tmp_path: Path, bias: bool, prefix: str
) -> None:
    theirs = save_nanogpt(tmp_path / "ckpt.pt", bias, prefix)
    with torch.no_grad():
        expected = theirs(ids)
    for given in (tmp_path / "ckpt.pt", tmp_path, str(tmp_path)):
        assert_close(logits(GPT2.from_pretrained(given)), expected, atol=2e-4, rtol=1e-5)
    main(["convert", str(tmp_path / "ckpt.pt"), str(tmp_path / "out")])
    assert_close(logits(GPT2.from_pretrained(tmp_path / "out")), expected, atol=2e-4, rtol=1e-5)


def test_nanogpt_s_first_files_have_the_tanh_form_of_gelu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = F.gelu
    theirs = save_nanogpt(tmp_path / "between.pt", bias=True)
    contents = torch.load(tmp_path / "between.pt", weights_only=True)
    del contents["model_args"]["bias"]
    torch.save(contents, tmp_path / "first.pt")
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(F, "gelu", lambda x: exact(x, approximate="tanh"))
        expected = theirs(ids)
    found = logits(GPT2.from_pretrained(tmp_path / "first.pt"))
    assert_close(found, expected, atol=2e-4, rtol=1e-5)
    # one of the months between is corrected as the README says
    assert not torch.allclose(logits(GPT2.from_pretrained(tmp_path / "between.pt")), expected)
    main(["convert", str(tmp_path / "between.pt"), str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    config["activation_function"] = "gelu_new"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert_close(logits(GPT2.from_pretrained(tmp_path / "out")), expected, atol=2e-4, rtol=1e-5)


def test_a_bias_that_is_missing_in_nanogpt_s_first_files_is_named(tmp_path: Path) -> None:
    save_nanogpt(tmp_path / "ckpt.pt", bias=False)
    contents = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    del contents["model_args"]["bias"]
    torch.save(contents, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"h\.0\.ln_1\.bias"):
        GPT2.from_pretrained(tmp_path)


def test_a_padded_vocabulary_of_nanogpt_ends_texts_as_gpt2_s(tmp_path: Path) -> None:
    theirs = NanoGPT(50304, 4, 2, 1, 1, bias=True)
    numbers = {"n_layer": 1, "n_head": 1, "n_embd": 2, "block_size": 4, "vocab_size": 50304}
    contents = {"model": theirs.state_dict(), "model_args": numbers | {"bias": True}}
    torch.save(contents, tmp_path / "ckpt.pt")
    assert GPT2.from_pretrained(tmp_path).config.eos_id == 50256


@pytest.mark.parametrize("name", ["ckpt.pt", "pytorch_model.bin"])
def test_a_compressed_archive_is_refused(tmp_path: Path, name: str) -> None:
    """Its bytes, mapped into memory as they are, would be read as numbers."""
    save_nanogpt(tmp_path / "plain.pt", True, "")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))
    (tmp_path / "plain.pt").unlink()
    if name.endswith(".bin"):
        (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="compressed data"):
        GPT2.from_pretrained(tmp_path)


def test_a_state_dict_alone_is_no_checkpoint_of_nanogpt(tmp_path: Path, tiny_model: GPT2) -> None:
    torch.save(tiny_model.state_dict(), tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint of nanoGPT.*pytorch_model.bin"):
        GPT2.from_pretrained(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_weights_may_lie_under_a_key(tmp_path: Path, tiny_model: GPT2, key: str) -> None:
    tiny_model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = to_published(tiny_model.state_dict(), TINY)
    torch.save({key: weights, "epoch": 3, "lr": [1e-3]}, tmp_path / "pytorch_model.bin")
    assert torch.equal(logits(GPT2.from_pretrained(tmp_path)), logits(tiny_model))


# ---- llm.c


def save_llmc(path: Path, model: GPT2, version: int) -> None:
    """As `write_model` of its train_gpt2.py."""
    config, tensors = model.config, same_layout(model)
    padded = config.vocab_size if version == 1 else -(-config.vocab_size // 128) * 128
    header = np.zeros(256, "<i4")
    sizes = (config.context_length, config.vocab_size, config.n_layers, config.n_heads)
    header[:8] = (20240326, version, *sizes, config.emb_dim, padded)
    wte = F.pad(tensors["wte.weight"], (0, 0, 0, padded - config.vocab_size))
    ends = [f"{part}.{kind}" for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2")
            for kind in ("weight", "bias")]  # fmt: skip
    ends += [f"mlp.{part}.{kind}" for part in ("c_fc", "c_proj") for kind in ("weight", "bias")]
    names = [f"h.{layer}.{end}" for end in ends for layer in range(config.n_layers)]
    parts = [wte, *(tensors[n] for n in ("wpe.weight", *names, "ln_f.weight", "ln_f.bias"))]
    flat = torch.cat([part.flatten() for part in parts])
    integers = flat.bfloat16().view(torch.int16) if version == 5 else flat
    path.write_bytes(header.tobytes() + integers.numpy().tobytes())


@pytest.mark.parametrize("version", [1, 3, 5])
def test_llm_c_s_file_holds_the_same_model(tmp_path: Path, tiny_model: GPT2, version: int) -> None:
    save_llmc(tmp_path / "gpt2_tiny.bin", tiny_model, version)
    found = GPT2.from_pretrained(tmp_path / "gpt2_tiny.bin")
    assert found.config == TINY
    for name, tensor in tiny_model.state_dict().items():
        expected = tensor.bfloat16().float() if version == 5 else tensor
        assert torch.equal(found.state_dict()[name], expected), name


def test_a_damaged_file_of_llm_c_is_refused(tmp_path: Path, tiny_model: GPT2) -> None:
    path = tmp_path / "gpt2_tiny.bin"
    save_llmc(path, tiny_model, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"has [\d,]+ bytes; its header asks for"):
        GPT2.from_pretrained(path)
    path.write_bytes(struct.pack("<2i", 20240326, 9) + whole[8:])
    with pytest.raises(CheckpointError, match="is of version 9"):
        GPT2.from_pretrained(path)


# ---- GGUF

PARTS = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"}
PARTS |= {"ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}


def save_gguf(path: Path, model: GPT2, kind: str, architecture: str = "gpt2") -> None:
    """As convert_hf_to_gguf.py of llama.cpp, with the package's own writer."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.emb_dim)
    writer.add_feed_forward_length(4 * config.emb_dim)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(1e-5)
    for name, tensor in same_layout(model).items():
        for old, new in PARTS.items():
            name = name.replace(f".{old}.", f".{new}.").replace("h.", "blk.", name.startswith("h."))
        for old, new in (("wte", "token_embd"), ("wpe", "position_embd"), ("ln_f", "output_norm")):
            name = name.replace(f"{old}.", f"{new}.", name.startswith(old))
        numbers = tensor.numpy()
        if tensor.ndim == 2 and kind == "Q8_0":
            quantized = gguf.quantize(numbers, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, numbers.astype(np.float16 if kind == "F16" else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("kind", "far"), [("F32", 0.0), ("F16", 1e-3), ("Q8_0", 2e-2)])
def test_a_gguf_file_holds_the_same_model(tmp_path: Path, kind: str, far: float) -> None:
    torch.manual_seed(0)
    config = replace(TINY, emb_dim=64, n_heads=4)  # quantized in blocks of 32
    model = GPT2(config).eval()
    enlarge(model)
    save_gguf(tmp_path / "model.gguf", model, kind)
    found = GPT2.from_pretrained(tmp_path / "model.gguf")
    assert found.config == config and found.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert_close(found.state_dict()[name], tensor, atol=far, rtol=far)


def test_a_gguf_file_of_another_model_is_refused(tmp_path: Path, tiny_model: GPT2) -> None:
    save_gguf(tmp_path / "model.gguf", tiny_model, "F32", architecture="llama")
    with pytest.raises(CheckpointError, match="type 'llama'; expected 'gpt2'"):
        GPT2.from_pretrained(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(CheckpointError, match=r"model\.gguf cannot be read"):
        GPT2.from_pretrained(tmp_path / "model.gguf")


def test_a_folder_with_two_such_files_asks_for_one(tmp_path: Path, tiny_model: GPT2) -> None:
    for name in ("a.bin", "b.bin"):
        save_llmc(tmp_path / name, tiny_model, 3)
    with pytest.raises(CheckpointError, match=r"several models, a\.bin, b\.bin: give the path"):
        GPT2.from_pretrained(tmp_path)


def test_one_file_of_several_is_converted(tmp_path: Path, tiny_model: GPT2) -> None:
    for name in ("a.bin", "b.bin"):
        save_llmc(tmp_path / name, tiny_model, 3)
    done = run("convert", tmp_path / "a.bin", tmp_path / "out")
    assert done.returncode == 0 and "has no tokenizer files" in done.stdout, done.stderr
    assert torch.equal(logits(GPT2.from_pretrained(tmp_path / "out")), logits(tiny_model))


def test_the_form_of_gelu_is_tanh_or_exact() -> None:
    with pytest.raises(ValueError, match="gelu must be 'tanh' or"):
        GPT2Config(gelu="erf")
