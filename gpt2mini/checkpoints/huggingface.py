"""Hugging Face GPT-2 folders, in and out: config.json and the weights beside it."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from gpt2mini.checkpoints.config_json import (
    CONFIG,
    DROPOUTS,
    GENERATION_CONFIG,
    count_classes,
    describe_classes,
    describe_generation,
    describe_model,
    effective_eos_id,
    parse_config,
    read_config,
    read_generation_config,
)
from gpt2mini.checkpoints.names import CLASS_HEAD, CLASS_HEAD_BIAS, OWN_HEAD, Rule, to_published
from gpt2mini.checkpoints.origin import Origin, origin_of
from gpt2mini.checkpoints.stored import (
    ADAPTER_FILES,
    Checkpoint,
    CheckpointError,
    read_weights,
    reading,
)
from gpt2mini.device import weight_dtype
from gpt2mini.files import (
    Write,
    as_json,
    text_writer,
    writable_folder,
    write_together,
)
from gpt2mini.model import GPT2, TiedHead
from gpt2mini.quantized_layers import refuse_quantized

logger = logging.getLogger(__name__)

# ---- in


def read_folder(folder: Path) -> Checkpoint:
    """The checkpoint of a Hugging Face folder, its weights in any of the forms there are."""
    contents = read_config(folder)
    with reading(folder / CONFIG):
        config = parse_config(contents)
        classes = count_classes(contents)
    tensors = read_weights(folder)
    score = tensors.get("score.weight")
    if score is not None and classes is not None and score.shape[:1] != (classes,):
        raise CheckpointError(
            f"{score.file}: score.weight has the shape {score.shape}; "
            f"config.json lists {classes} classes"
        )
    tied = contents.get("tie_word_embeddings") is not False
    origin = Origin(str(folder.resolve()), DROPOUTS | contents, read_generation_config(folder))
    return Checkpoint(folder, config, tensors, tied, origin)


# ---- out


def write_folder(
    model: GPT2,
    folder: Path,
    dtype: torch.dtype | str | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write config.json, generation_config.json and model.safetensors: all of them or none.

    An adapter that lay in the folder is removed: it belongs to another model than this one.
    """
    refuse_quantized(model, "saving")
    head = head_rules(model)
    if class_names is not None:
        check_class_names(model, head, class_names)
    if CLASS_HEAD_BIAS[0] in head:
        logger.warning(
            "the head's bias is saved as score.bias, which transformers does not know and leaves "
            "out: use nn.Linear(..., bias=False) for a classifier that it is to open"
        )
    state = model.state_dict()
    if is_tied(model):
        state.pop("out_head.weight", None)
    dtype = None if dtype is None else weight_dtype(dtype)
    tensors = {
        rename(name): tensor.detach().to("cpu", dtype or weight_dtype(tensor.dtype))
        for name, tensor in to_published(state, model.config, head).items()
    }
    writable_folder(folder)
    config = describe_folder(model, head, dtype or model.tok_emb.weight.dtype, class_names)
    files: dict[Path, Write] = {
        folder / CONFIG: text_writer(as_json(config)),
        folder / "model.safetensors": partial(save_file, tensors, metadata={"format": "pt"}),
    }
    if not is_classifier(head):
        origin = origin_of(model)
        generation = describe_generation(config, origin.generation, origin.settings)
        files[folder / GENERATION_CONFIG] = text_writer(as_json(generation))
    write_together(files)
    for name in ADAPTER_FILES:
        (folder / name).unlink(missing_ok=True)


def head_rules(model: GPT2) -> list[Rule]:
    """The rules for the head of a model, one that a Hugging Face folder has a place for."""
    head, config = model.out_head, model.config
    if is_tied(model):
        return []
    if isinstance(head, nn.Linear) and head.in_features == config.emb_dim:
        if head.out_features == config.vocab_size and head.bias is None:
            return OWN_HEAD
        return CLASS_HEAD + ([] if head.bias is None else CLASS_HEAD_BIAS)
    raise ValueError(
        f"the output head is {head}: a GPT-2 folder holds a head tied to tok_emb, "
        f"nn.Linear({config.emb_dim}, {config.vocab_size}, bias=False), "
        f"or a classifier's nn.Linear({config.emb_dim}, classes)"
    )


def is_tied(model: GPT2) -> bool:
    """Whether the head is the token embedding: a `TiedHead`, or a linear layer that was given its
    weight."""
    head = model.out_head
    is_plain = isinstance(head, TiedHead | nn.Linear) and head.bias is None
    return is_plain and head.weight is model.tok_emb.weight


def is_classifier(head: list[Rule]) -> bool:
    return CLASS_HEAD[0] in head


def n_classes(model: GPT2) -> int:
    assert isinstance(model.out_head, nn.Linear)
    return model.out_head.out_features


def check_class_names(model: GPT2, head: list[Rule], class_names: Sequence[str]) -> None:
    classes = n_classes(model) if is_classifier(head) else 0
    if len(class_names) != classes:
        raise ValueError(f"{len(class_names)} class names for a head of {classes} classes")


def describe_folder(
    model: GPT2, head: list[Rule], dtype: torch.dtype, class_names: Sequence[str] | None
) -> dict[str, Any]:
    """The contents of config.json."""
    settings = origin_of(model).settings
    contents = describe_model(model.config, settings) | {
        "architectures": ["GPT2LMHeadModel"],
        "tie_word_embeddings": head != OWN_HEAD,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if is_classifier(head):
        contents |= describe_classes(settings, n_classes(model), class_names)
        contents["architectures"] = ["GPT2ForSequenceClassification"]
        if contents.get("pad_token_id") is None:  # transformers finds the last token by it
            contents["pad_token_id"] = effective_eos_id(model.config)
    return contents


def rename(name: str) -> str:
    """`transformers` puts everything but the head under its inner model."""
    return name if name.startswith(("lm_head.", "score.")) else f"transformer.{name}"
