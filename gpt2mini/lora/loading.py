"""Adapters in PEFT's format (see `gpt2mini.lora.peft_format`) -> model."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gpt2mini.checkpoints.stored import (
    CheckpointError,
    read_safetensors,
    read_torch_file,
    reading,
)
from gpt2mini.device import WEIGHT_DTYPES
from gpt2mini.files import local_path, read_json
from gpt2mini.lora.adapt import (
    TARGETS,
    check_adapter_settings,
    check_name_is_free,
    insert_adapter,
    plain_layer,
)
from gpt2mini.lora.base_model import check_base, predicts_tokens
from gpt2mini.lora.layers import LoRALinear, linear_layer
from gpt2mini.lora.named import adapter_names, merged_layers
from gpt2mini.lora.peft_format import (
    CONFIG,
    DEFAULT_ALPHA,
    DEFAULT_RANK,
    OBEYED,
    PLAIN,
    PLAIN_INITS,
    PREFIX,
    PUBLISHED_LAYERS,
    TASKS,
    TENSOR_NAME,
    TOKEN_HEAD,
    WEIGHTS,
    WEIGHTS_BIN,
    WITHOUT_EFFECT,
)
from gpt2mini.model import GPT2


@dataclass(frozen=True)
class Adapter:
    """A and B of one published layer, and its alpha."""

    block: int
    published: str
    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    alpha: float


@torch.inference_mode(False)  # whose parameters could not be trained
def load_adapter(
    model: GPT2, folder: str | Path, name: str = "default", trainable: bool = True
) -> None:
    """Add the adapters of a folder to a model, in place, to use them or to go on training.

    An adapter that PEFT made for `attn.c_attn` becomes one each for query, key and value. A head in
    the folder becomes the model's. Everything but adapters and head is frozen; they are too unless
    `trainable`. name: to tell it from other adapters on the same base; this one is active
    (`set_adapter`).
    Raises CheckpointError, and leaves the model as it was, if the folder is damaged or belongs to
    another base model; ValueError if the model has an adapter of that name already.
    """
    check_name_is_free(model, name)
    folder = local_path(folder)
    config = read_peft_config(folder)
    path = adapter_file(folder)
    tensors, metadata = read_adapter_file(path)
    heads = {n: tensors.pop(n) for n in [*tensors] if n.split(".")[0] in TASKS}
    with reading(path):
        adapters = pair_up(tensors, config)
        layers = make_layers(model, adapters, config, metadata.get("gpt2mini.targets"))
        check_base(model, metadata.get("gpt2mini.base"))
        out_head = make_head(model, heads, config)
    insert_adapter(model, layers, name)
    if out_head is not None:
        model.out_head = out_head
    if not trainable:
        model.requires_grad_(False)


def read_peft_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        inside = sorted(str(config.parent) for config in folder.glob(f"*/{CONFIG}"))
        where = f"; there are adapters in {', '.join(inside)}: give one of them" if inside else ""
        there = "" if folder.is_dir() else " (there is no such folder)"
        raise CheckpointError(f"{folder} holds no adapter: it has no {CONFIG}{there}{where}")
    with reading(path):
        config = read_json(path)
        check_plain_lora(config)
    return config


def check_plain_lora(config: dict[str, Any]) -> None:
    """Raise ValueError for settings under which A and B mean something else than in plain LoRA."""
    for name, expected in PLAIN.items():
        found = config.get(name, expected)
        if found != expected:
            raise ValueError(f"{name} is {found!r}; only {expected!r} is supported")
    for name in config.keys() - PLAIN.keys() - OBEYED - WITHOUT_EFFECT:
        if config[name]:
            raise ValueError(f"{name} is {config[name]!r}; only plain LoRA is supported")
    init = config.get("init_lora_weights")
    if str(init).lower() not in PLAIN_INITS:
        raise ValueError(
            f"init_lora_weights is {init!r}, which may have changed the base's weights too; "
            f"supported are those that do not: {', '.join(PLAIN_INITS)}"
        )
    rank = config.get("r", DEFAULT_RANK)
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"r is {rank!r}; expected a rank, an integer of at least 1")
    saved = {*(config.get("modules_to_save") or [])}
    if unknown := saved - TASKS.keys() - {"classifier"}:
        raise ValueError(f"modules_to_save has {unknown}; only an output head is supported")
    if TOKEN_HEAD in saved and config.get("ensure_weight_tying"):
        raise ValueError("ensure_weight_tying is True: the token embedding was trained too")


def adapter_file(folder: Path) -> Path:
    """The file of an adapter's tensors, in the form that PEFT prefers."""
    found = [folder / name for name in (WEIGHTS, WEIGHTS_BIN) if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder} has no {WEIGHTS} (nor {WEIGHTS_BIN})")
    return found[0]


def read_adapter_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by their names without PEFT's prefix, metadata of the header, if it has one)."""
    metadata: dict[str, str] = {}
    with reading(path):
        if path.name == WEIGHTS:
            stored = read_safetensors(path)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        else:
            stored = read_torch_file(path)
        tensors = {n.removeprefix(PREFIX): tensor.read() for n, tensor in stored.items()}
        for name, tensor in tensors.items():
            if tensor.dtype not in WEIGHT_DTYPES:
                raise ValueError(
                    f"{name} holds {tensor.dtype}; expected weights of 16, 32 or 64 bits"
                )
    return tensors, metadata


def pair_up(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[Adapter]:
    """The adapters of a file, each with its A and its B."""
    pairs: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = TENSOR_NAME.fullmatch(name)
        if not found or found[2] not in PUBLISHED_LAYERS:
            raise ValueError(f"{name} is not an adapter of a linear layer of GPT-2")
        pairs.setdefault((int(found[1]), found[2]), {})[found[3]] = tensor
    if not pairs:
        raise ValueError("it holds no adapters")
    adapters = []
    for (block, published), pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"h.{block}.{published} has only its {next(iter(pair))}")
        usual_rank, usual_alpha = (
            config.get("r", DEFAULT_RANK),
            config.get("lora_alpha", DEFAULT_ALPHA),
        )
        rank = pattern(config, "rank_pattern", block, published, usual_rank)
        alpha = pattern(config, "alpha_pattern", block, published, usual_alpha)
        if pair["A"].shape[:1] != (rank,) or pair["B"].shape[1:] != (rank,):
            raise ValueError(
                f"h.{block}.{published} has an A of {tuple(pair['A'].shape)} and a B of "
                f"{tuple(pair['B'].shape)}; the config says rank {rank}"
            )
        adapters.append(Adapter(block, published, pair["A"], pair["B"], alpha))
    return adapters


def pattern(config: dict[str, Any], key: str, block: int, published: str, default: Any) -> Any:
    """A layer's own value in rank_pattern or alpha_pattern, which match the ends of names."""
    name = f"transformer.h.{block}.{published}"
    for expression, value in (config.get(key) or {}).items():
        if re.fullmatch(rf"(.*\.)?({expression})", name):
            return value
    return default


def make_layers(
    model: GPT2, adapters: list[Adapter], config: dict[str, Any], targets: str | None
) -> dict[str, LoRALinear]:
    """The adapted layers, filled, not yet in the model.

    targets: in files that `save_adapter` wrote, which of query, key and value have adapters; each
    has its own part of the rank. In PEFT's own files all three share the whole rank.
    """
    layers: dict[str, LoRALinear] = {}
    paths = [] if targets is None else [TARGETS.get(target) for target in targets.split(",")]
    for adapter in adapters:
        check_shape(model, adapter)
        ours = PUBLISHED_LAYERS[adapter.published]
        wanted = [n for n in ours if targets is None or n in paths]
        if not wanted:
            raise ValueError(f"its header does not list h.{adapter.block}.{adapter.published}")
        rank = len(adapter.a) if targets is None else len(adapter.a) // len(wanted)
        for number, name in enumerate(wanted):
            first = 0 if targets is None else number * rank
            path = f"trf_blocks.{adapter.block}.{name}"
            base = plain_layer(model, path)
            assert isinstance(base, nn.Linear)
            layers[path] = make_layer(
                base, adapter, slice(first, first + rank), ours.index(name), config
            )
    return layers


def check_shape(model: GPT2, adapter: Adapter) -> None:
    """Raise ValueError if the model has no such layer."""
    if adapter.block >= model.config.n_layers:
        raise ValueError(
            f"it is for another model: it has a block {adapter.block}, "
            f"and this model {model.config.n_layers} blocks"
        )
    ours = PUBLISHED_LAYERS[adapter.published]
    base = model.trf_blocks[adapter.block].get_submodule(ours[0])
    assert isinstance(base, nn.Linear)
    out = len(ours) * base.out_features
    if adapter.a.shape[1] != base.in_features or adapter.b.shape != (out, len(adapter.a)):
        raise ValueError(
            f"it is for another model: h.{adapter.block}.{adapter.published} has an A of "
            f"{tuple(adapter.a.shape)} and a B of {tuple(adapter.b.shape)} for a layer of "
            f"{base.in_features} to {out}"
        )


def make_layer(
    base: nn.Linear, adapter: Adapter, ranks: slice, number: int, config: dict[str, Any]
) -> LoRALinear:
    """One of our layers: some ranks of a published adapter, and the `number`th part of its
    outputs."""
    rank = ranks.stop - ranks.start
    stabilized = bool(config.get("use_rslora"))
    share = rank / len(adapter.a)
    alpha = adapter.alpha * (math.sqrt(share) if stabilized else share)
    dropout = config.get("lora_dropout", 0.0)
    check_adapter_settings(rank, alpha, dropout)
    layer = LoRALinear(base, rank, alpha, dropout, stabilized)
    outputs = slice(number * base.out_features, (number + 1) * base.out_features)
    with torch.no_grad():
        layer.lora_A.copy_(adapter.a[ranks])
        layer.lora_B.copy_(adapter.b[outputs, ranks])
    return layer


def make_head(model: GPT2, tensors: dict[str, Tensor], config: dict[str, Any]) -> nn.Linear | None:
    """The head that was trained along, or None if there was none. tensors: by names such as
    "score.weight"."""
    check_head_is_free(model, bool(tensors))
    if not tensors:
        if config.get("modules_to_save"):
            raise ValueError("the head that its config lists (modules_to_save) is missing")
        return None
    kinds = {name.partition(".")[0] for name in tensors}
    parts = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    weight = parts.get("weight")
    if len(kinds) > 1 or weight is None or weight.shape[1:] != (model.config.emb_dim,):
        raise ValueError(f"its head does not fit a model of width {model.config.emb_dim}")
    outputs = model.config.vocab_size if kinds == {TOKEN_HEAD} else own_classes(model)
    if outputs not in (None, len(weight)):
        what = "tokens" if kinds == {TOKEN_HEAD} else "classes"
        raise ValueError(f"its head has {len(weight)} {what}; the model's has {outputs}")
    like = model.tok_emb.weight
    own = {
        name: nn.Parameter(t.to(like.device, like.dtype, copy=True)) for name, t in parts.items()
    }
    return linear_layer(own["weight"], own.get("bias"))


def check_head_is_free(model: GPT2, brings_head: bool) -> None:
    """Raise ValueError if this adapter and others on the model would share the head of one."""
    alone = not adapter_names(model) or merged_layers(model)
    if not alone and (brings_head or own_classes(model) is not None):
        whose = "it has a head of its own" if brings_head else "the model's head is another one's"
        raise ValueError(
            f"{whose}, which all adapters on the model would share: load the base once for each"
        )


def own_classes(model: GPT2) -> int | None:
    """How many classes the model's head tells apart; None if it predicts tokens."""
    return None if predicts_tokens(model) else getattr(model.out_head, "out_features", None)
