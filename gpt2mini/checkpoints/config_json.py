"""config.json of a Hugging Face GPT-2 folder -> GPT2Config, and the names of classes."""

from pathlib import Path
from typing import Any

from gpt2mini.checkpoints.stored import ADAPTER_FILES, CheckpointError, holds_adapter, reading
from gpt2mini.config import GPT2Config
from gpt2mini.files import read_json

# What a config.json may say of the architecture, and the one value that GPT-2 has.
FIXED = {
    "activation_function": "gelu_new",  # the tanh form
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
SAME_FUNCTION = {"gelu_new", "gelu_pytorch_tanh", "gelu_fast"}  # all of them the tanh form


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of config.json, if it describes a GPT-2 and nothing else."""
    path = folder / "config.json"
    if holds_adapter(folder):
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER_FILES[0]}), not a whole model: load the model "
            "that it was trained on, then add it with load_adapter(model, folder)"
        )
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a model folder: it has no config.json (nor OpenAI's hparams.json)"
        )
    with reading(path):
        contents = read_json(path)
        if not isinstance(contents, dict) or contents.get("model_type", "gpt2") != "gpt2":
            kind = contents.get("model_type") if isinstance(contents, dict) else contents
            raise CheckpointError(f"{path} describes a model of type {kind!r}; expected 'gpt2'")
        for name, expected in FIXED.items():
            found = contents.get(name, expected)
            if found != expected and not (name == "activation_function" and found in SAME_FUNCTION):
                raise CheckpointError(
                    f"{path}: {name} is {found!r}; GPT-2 has {expected!r} and gpt2mini only that"
                )
    return contents


def parse_config(contents: dict[str, Any]) -> GPT2Config:
    """What config.json says, in our words. Dropout is left out: it is the trainer's business."""
    defaults = GPT2Config()
    vocab_size = contents.get("vocab_size", defaults.vocab_size)
    eos_id = contents.get("eos_token_id")
    config = GPT2Config(
        vocab_size=vocab_size,
        context_length=contents.get("n_positions")
        or contents.get("n_ctx", defaults.context_length),
        emb_dim=contents.get("n_embd", defaults.emb_dim),
        n_heads=contents.get("n_head", defaults.n_heads),
        n_layers=contents.get("n_layer", defaults.n_layers),
        # `transformers` writes 50256 for every vocabulary unless told otherwise
        eos_id=eos_id if type(eos_id) is int and 0 <= eos_id < vocab_size - 1 else None,
    )
    if contents.get("n_inner") not in (None, 4 * config.emb_dim):
        raise ValueError(f"n_inner is {contents['n_inner']}; GPT-2's MLP is 4 * n_embd wide")
    return config


def read_class_names(folder: str | Path) -> list[str]:
    """The names of the classes that a classifier's folder tells apart, in the order of its logits.

    Raises CheckpointError if config.json does not name them.
    """
    path = Path(folder) / "config.json"
    with reading(path):
        labels = read_json(path).get("id2label") or {}
        names = [labels[str(i)] for i in range(len(labels)) if str(i) in labels]
        if not names or len(names) < len(labels):
            raise CheckpointError(f"{path} does not name the classes (id2label): {labels}")
    return [str(name) for name in names]
