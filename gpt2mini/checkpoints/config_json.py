"""config.json of a Hugging Face GPT-2 folder, read and written.

Every setting has one of four fates: it is a number of `GPT2Config` (`NUMBERS`), it is part of the
architecture and has to be GPT-2's (`FIXED`), it would change the numbers and is refused by name
(`REFUSED`), or it does not touch them and is kept with the model, to be written back.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt2mini.checkpoints.stored import ADAPTER_FILES, CheckpointError, holds_adapter, reading
from gpt2mini.config import GPT2Config
from gpt2mini.files import local_path, read_json

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
CONFIG_FILES = (CONFIG, GENERATION_CONFIG)  # all that is read here

# Our field -> its names there; the first is written. `transformers` knows the aliases
# (GPT2Config.attribute_map); n_ctx is its older name, which llama.cpp's converter reads.
NUMBERS = {
    "vocab_size": ("vocab_size",),
    "context_length": ("n_positions", "max_position_embeddings", "n_ctx"),
    "emb_dim": ("n_embd", "hidden_size"),
    "n_heads": ("n_head", "num_attention_heads"),
    "n_layers": ("n_layer", "num_hidden_layers"),
}
# What a config.json may say of the architecture, and the one value that GPT-2 has.
FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
ACTIVATIONS = {  # a form of GELU -> transformers' names for it; the first is written
    "tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"),
    "none": ("gelu", "gelu_python"),  # the exact form
}
REFUSED = {
    "quantization_config": "the weights are in a quantized form; take the model that was quantized",
    "pruned_heads": "attention heads were taken out of the model",
    "auto_map": "the model comes with code of its own, which is not run",
    "is_encoder_decoder": "GPT-2 is a decoder alone",
}
# Dropout is not taken over, for it is the trainer's business. It is kept: transformers' default.
DROPOUTS = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.1)
EOS_OF_TRANSFORMERS = 50256  # where a config.json does not say


# ---- in


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of config.json, if it describes a GPT-2 and nothing else."""
    path = folder / CONFIG
    check_holds_model(folder)
    if (folder / ADAPTER_FILES[0]).is_file():
        raise CheckpointError(
            f"{folder} holds a whole model and an adapter ({ADAPTER_FILES[0]}): transformers would "
            "apply the adapter, and it is not clear what is meant. Move the adapter's files into a "
            "folder of their own; load_adapter(model, folder) adds them"
        )
    with reading(path):
        contents = read_json(path)
        if not isinstance(contents, dict) or contents.get("model_type", "gpt2") != "gpt2":
            kind = contents.get("model_type") if isinstance(contents, dict) else contents
            raise CheckpointError(f"{path} describes a model of type {kind!r}; expected 'gpt2'")
        for name, expected in FIXED.items():
            found = contents.get(name, expected)
            if found != expected:
                raise CheckpointError(
                    f"{path}: {name} is {found!r}; GPT-2 has {expected!r} and gpt2mini only that"
                )
        for name, reason in REFUSED.items():
            if contents.get(name):
                raise CheckpointError(f"{path}: {name} is {contents[name]!r}: {reason}")
    return contents


def check_holds_model(folder: Path) -> None:
    """Raise CheckpointError for a folder without config.json; it says where the model may be."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            where_the_model_is(folder)
            or f"{folder} is not a model folder: it has no {CONFIG} (nor OpenAI's hparams.json)"
        )


def where_the_model_is(folder: Path) -> str | None:
    """What to give instead of the folder of an adapter, or of a run with its best model inside."""
    if holds_adapter(folder):
        return (
            f"{folder} holds an adapter ({ADAPTER_FILES[0]}), not a whole model: load the model "
            f"that it was trained on{name_of_base(folder)}, then add it with "
            "load_adapter(model, folder); in the command --model BASE --adapter FOLDER"
        )
    inside = [*folder.glob(f"*/{CONFIG}"), *folder.glob(f"*/{ADAPTER_FILES[0]}")]
    if (folder / CONFIG).is_file() or not inside:
        return None
    folders = " or ".join(sorted({str(path.parent) for path in inside}))
    return (
        f"{folder} is not a model folder: it has no {CONFIG}; give the folder inside it, {folders}"
    )


def name_of_base(folder: Path) -> str:
    """In brackets, the base model that an adapter's folder names; or nothing."""
    with reading(folder / ADAPTER_FILES[0]):
        contents = read_json(folder / ADAPTER_FILES[0])
    base = contents.get("base_model_name_or_path") if isinstance(contents, dict) else None
    return f" ({base})" if base else ""


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The contents of generation_config.json; empty if there is none."""
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return {}
    with reading(path):
        contents = read_json(path)
        if not isinstance(contents, dict):
            raise ValueError(f"expected an object of settings, not {contents!r}")
    return contents


def parse_config(contents: dict[str, Any]) -> GPT2Config:
    """What config.json says, in our words. Raises ValueError for settings that contradict each
    other or fit no GPT-2. What is missing has transformers' default."""
    found = {ours: one_value(contents, names) for ours, names in NUMBERS.items()}
    config = GPT2Config(**{ours: value for ours, value in found.items() if value is not None})
    if contents.get("n_inner") not in (None, 4 * config.emb_dim):
        raise ValueError(f"n_inner is {contents['n_inner']}; GPT-2's MLP is 4 * n_embd wide")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        check_token_ids(name, contents.get(name))
    eos_id = find_eos_id(contents, config.vocab_size)
    return replace(config, gelu=find_activation(contents), eos_id=eos_id)


def find_activation(contents: dict[str, Any]) -> str:
    """Which form of GELU the activation function is."""
    found = contents.get("activation_function", ACTIVATIONS["tanh"][0])
    for form, names in ACTIVATIONS.items():
        if found in names:
            return form
    known = ", ".join(name for names in ACTIVATIONS.values() for name in names)
    raise ValueError(f"activation_function is {found!r}; GPT-2 has a GELU, one of {known}")


def one_value(contents: dict[str, Any], names: Sequence[str]) -> Any:
    """The value that stands under one of the names, or under several if they agree."""
    found = {name: contents[name] for name in names if contents.get(name) is not None}
    if any(value != next(iter(found.values())) for value in found.values()):
        said = " and ".join(f"{name} is {value!r}" for name, value in found.items())
        raise ValueError(f"{said}: these are two names of one number, take the wrong one out")
    return next(iter(found.values()), None)


def check_token_ids(name: str, value: Any) -> None:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int for token_id in ids):
        raise ValueError(f"{name} is {value!r}; expected a token id, a list of them, or null")


def find_eos_id(contents: dict[str, Any], vocab_size: int) -> int | None:
    """The first end of a text that lies in the vocabulary; None: its last token.

    `transformers` writes 50256 for every vocabulary unless told otherwise, so an id outside says
    nothing.
    """
    ids = contents.get("eos_token_id", EOS_OF_TRANSFORMERS)
    inside = [i for i in (ids if isinstance(ids, list) else [ids]) if in_vocabulary(i, vocab_size)]
    return inside[0] if inside and inside[0] < vocab_size - 1 else None


def in_vocabulary(ids: Any, vocab_size: int) -> bool:
    """Whether one token id, or every one of a list, is there."""
    if isinstance(ids, list):
        return bool(ids) and all(in_vocabulary(token_id, vocab_size) for token_id in ids)
    return isinstance(ids, int) and 0 <= ids < vocab_size


def count_classes(contents: dict[str, Any]) -> int | None:
    """How many classes config.json lists or counts; None: it does not say."""
    labels, counted = contents.get("id2label"), contents.get("num_labels")
    listed = len(labels) if isinstance(labels, dict) else None
    if counted is not None and listed not in (None, counted):
        raise ValueError(f"num_labels is {counted!r}, and id2label lists {listed} classes")
    return counted if listed is None else listed


def read_class_names(folder: str | Path) -> list[str]:
    """The names of the classes that a classifier's folder tells apart, in the order of its logits.

    Raises CheckpointError if config.json does not name them. (`transformers` writes no names for
    the two classes LABEL_0 and LABEL_1, its default.)
    """
    path = local_path(folder) / CONFIG
    with reading(path):
        contents = read_json(path)
        labels = contents.get("id2label") or {}
        is_classifier = contents.get("architectures") == ["GPT2ForSequenceClassification"]
        if is_classifier and not labels and contents.get("num_labels", 2) == 2:
            return ["LABEL_0", "LABEL_1"]
        names = [labels[str(i)] for i in range(len(labels)) if str(i) in labels]
        if not names or len(names) < len(labels):
            raise CheckpointError(f"{path} does not name the classes (id2label): {labels}")
    return [str(name) for name in names]


# ---- out


def describe_model(config: GPT2Config, settings: dict[str, Any]) -> dict[str, Any]:
    """The contents of config.json, but for what depends on the head and the file.

    settings: of the config.json that the model was loaded from, kept where they still hold.
    """
    numbers = {names[0]: getattr(config, ours) for ours, names in NUMBERS.items()}
    written = {name for names in NUMBERS.values() for name in names}
    written |= {"pad_token_id", "dtype", "torch_dtype"}  # here and in `describe_folder`
    contents = {
        "model_type": "gpt2",
        **numbers,
        "n_ctx": config.context_length,
        "activation_function": describe_activation(config, settings),
        **{name: settings.get(name, value) for name, value in FIXED.items()},
        **{name: config.drop_rate or settings.get(name, 0.0) for name in DROPOUTS},
        **describe_token_ids(config, settings),
    }
    rest = {n: v for n, v in settings.items() if n not in contents and n not in written}
    return contents | rest


def describe_activation(config: GPT2Config, settings: dict[str, Any]) -> str:
    """The name in the settings, if it means the same function."""
    names, found = ACTIVATIONS[config.gelu], settings.get("activation_function")
    return found if found in names else names[0]


def effective_eos_id(config: GPT2Config) -> int:
    return config.vocab_size - 1 if config.eos_id is None else config.eos_id


def describe_token_ids(config: GPT2Config, settings: dict[str, Any]) -> dict[str, Any]:
    """bos_token_id and eos_token_id, and pad_token_id if the settings have it. Those of the
    settings are kept if they are in the vocabulary, and name the same end of a text."""
    eos_id = effective_eos_id(config)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    kept = {
        name: settings[name]
        for name in names
        if name in settings
        and (settings[name] is None or in_vocabulary(settings[name], config.vocab_size))
    }
    first = first_of(kept.get("eos_token_id", eos_id))
    if first != eos_id and not (first is None and config.eos_id is None):
        del kept["eos_token_id"]
    return {"bos_token_id": eos_id, "eos_token_id": eos_id} | kept


def first_of(ids: Any) -> Any:
    return ids[0] if isinstance(ids, list) else ids


def describe_generation(
    config: dict[str, Any], settings: dict[str, Any], config_before: dict[str, Any]
) -> dict[str, Any]:
    """The contents of generation_config.json. settings: of the one that was read, of which only
    token ids outside the vocabulary are left out, and an end of a text that was that of the
    config.json read beside it, `config_before`, and is no longer that of `config`."""
    kept = {
        name: value
        for name, value in settings.items()
        if not name.endswith("_token_id")
        or value is None
        or in_vocabulary(value, config["vocab_size"])
    }
    now, before = (effective_eos_id(parse_config(one)) for one in (config, config_before))
    if first_of(kept.get("eos_token_id")) == before != now:
        del kept["eos_token_id"]
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    return ends | kept


def describe_classes(
    settings: dict[str, Any], classes: int, class_names: Sequence[str] | None
) -> dict[str, Any]:
    """The names of a classifier's classes: those given, or those of the settings if they are as
    many, or LABEL_0, LABEL_1, ..."""
    labels = settings.get("id2label")
    if class_names is None and isinstance(labels, dict) and len(labels) == classes:
        return {n: v for n, v in settings.items() if n in ("id2label", "label2id")}
    names = class_names or [f"LABEL_{i}" for i in range(classes)]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        **({"num_labels": classes} if "num_labels" in settings else {}),
    }
