"""Hugging Face GPT-2 folders, in and out: config.json and model.safetensors."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gpt2mini.checkpoints.names import fill_from_published, rules, to_published
from gpt2mini.config import GPT2Config
from gpt2mini.files import read_json, writable_folder, write_aside, write_json
from gpt2mini.model import GPT2, TiedHead

WEIGHTS = "model.safetensors"

# What a config.json may say of the architecture, and the one value that GPT-2 has.
FIXED = {
    "activation_function": "gelu_new",  # the tanh form
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
SAME_FUNCTION = {"gelu_new", "gelu_pytorch_tanh", "gelu_fast"}  # all of them the tanh form


def read_config(folder: Path) -> GPT2Config:
    """config.json -> GPT2Config. Raises ValueError if it describes something other than a GPT-2."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
    contents = read_json(path)
    if not isinstance(contents, dict) or contents.get("model_type", "gpt2") != "gpt2":
        kind = contents.get("model_type") if isinstance(contents, dict) else contents
        raise ValueError(f"{path} describes a model of type {kind!r}; expected 'gpt2'")
    for name, expected in FIXED.items():
        found = contents.get(name, expected)
        if found != expected and not (name == "activation_function" and found in SAME_FUNCTION):
            raise ValueError(
                f"{path}: {name} is {found!r}; GPT-2 has {expected!r} and gpt2mini only that"
            )
    defaults = GPT2Config()
    try:
        config = GPT2Config(
            vocab_size=contents.get("vocab_size", defaults.vocab_size),
            context_length=contents.get("n_positions")
            or contents.get("n_ctx", defaults.context_length),
            emb_dim=contents.get("n_embd", defaults.emb_dim),
            n_heads=contents.get("n_head", defaults.n_heads),
            n_layers=contents.get("n_layer", defaults.n_layers),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if contents.get("n_inner") not in (None, 4 * config.emb_dim):
        raise ValueError(
            f"{path}: n_inner is {contents['n_inner']}; GPT-2's MLP is 4 * n_embd wide"
        )
    return config


def write_config(folder: Path, model: GPT2) -> None:
    config = model.config
    write_json(
        folder / "config.json",
        {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": config.vocab_size,
            "n_positions": config.context_length,
            "n_embd": config.emb_dim,
            "n_head": config.n_heads,
            "n_layer": config.n_layers,
            **FIXED,
            "embd_pdrop": config.drop_rate,
            "attn_pdrop": config.drop_rate,
            "resid_pdrop": config.drop_rate,
            "bos_token_id": config.vocab_size - 1,
            "eos_token_id": config.vocab_size - 1,
            "tie_word_embeddings": isinstance(model.out_head, TiedHead),
            "dtype": str(model.tok_emb.weight.dtype).removeprefix("torch."),
        },
    )


class NoInit(TorchFunctionMode):
    """Skip the functions of `torch.nn.init`: the new weights are about to be filled from a file.

    (Building on the meta device would skip them too, but its random functions import torch's
    compiler: 800 modules and several seconds, for a model of any size.)
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def read_model(folder: Path, dtype: torch.dtype | None, device: torch.device) -> GPT2:
    """The model of a folder. dtype None: float32, whatever the file holds."""
    config = read_config(folder)
    path = folder / WEIGHTS
    published = read_tensors(path)
    head = published.get("lm_head.weight")
    tied = head is None or torch.equal(head, published.get("wte.weight", head))
    if tied:
        published.pop("lm_head.weight", None)  # a second copy of the embedding
    with device, NoInit():  # no work and no random numbers for weights that are about to be filled
        model = GPT2(config)
        if not tied:
            model.out_head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
    model.to(dtype or torch.float32)
    try:
        fill_from_published(model, published, rules(config, tied))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return model.eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory, without the prefix `transformer.`"""
    if not path.is_file():
        found = sorted(file.name for file in path.parent.iterdir())
        raise FileNotFoundError(f"{path.parent} has no {path.name}; found {found}")
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            for name in names:
                short = name.removeprefix("transformer.")
                if short in tensors:
                    raise ValueError(f"{path}: {short} is there twice, also as transformer.{short}")
                tensors[short] = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None
    return tensors


def write_model(model: GPT2, folder: Path) -> None:
    """Write config.json and model.safetensors, each whole or not at all."""
    config, head = model.config, model.out_head
    tied = isinstance(head, TiedHead)
    if not tied and not (
        isinstance(head, nn.Linear) and head.out_features == config.vocab_size and head.bias is None
    ):
        raise ValueError(
            f"the output head is {head}: a GPT-2 language model folder holds a tied head "
            f"or nn.Linear({config.emb_dim}, {config.vocab_size}, bias=False)"
        )
    tensors = {
        rename(name): tensor.detach().cpu()
        for name, tensor in to_published(model.state_dict(), config, tied).items()
    }
    writable_folder(folder)
    write_aside(
        folder / WEIGHTS, lambda aside: save_file(tensors, aside, metadata={"format": "pt"})
    )
    write_config(folder, model)


def rename(name: str) -> str:
    """`transformers` puts everything but the head under its inner model."""
    return name if name == "lm_head.weight" else f"transformer.{name}"
