"""Adapters <-> files, in the format of Hugging Face's PEFT: adapter_config.json and
adapter_model.safetensors.

PEFT sees the published GPT-2, in which query, key and value are one matrix. Their adapters become
one there that computes the same: the As on top of each other, the Bs on a diagonal. A head that was
trained along is saved with them.
"""

import json
import logging
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gpt2mini.checkpoints.names import BLOCK
from gpt2mini.checkpoints.stored import (
    ADAPTER_FILES,
    MODEL_FILES,
    CheckpointError,
    read_safetensors,
    reading,
)
from gpt2mini.files import as_json, read_json, text_writer, writable_folder, write_together
from gpt2mini.lora.layers import (
    TARGETS,
    LoRALinear,
    linear,
    lora_layers,
    refuse_adapters,
    replace_layer,
)
from gpt2mini.model import GPT2, TiedHead

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS = ADAPTER_FILES
PREFIX = "base_model.model."
ADAPTER_NAME = re.compile(r"(?:transformer\.)?h\.(\d+)\.(.+)\.lora_([AB])\.weight")

# Published linear layers and ours: `attn.c_attn` -> query, key and value.
PUBLISHED_LAYERS = {
    rule.published.removesuffix(".weight"): [name.removesuffix(".weight") for name in rule.ours]
    for rule in BLOCK
    if rule.transposed
}
SHORT_NAMES = {path: target for target, path in TARGETS.items()}

# What else a PEFT config may ask for, and the value that leaves it at plain LoRA.
PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "lora_bias": False}
# The same, of later versions of PEFT: not written, for the earlier ones would not know the names.
UNSET = (
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Beginnings that leave the base as it is. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change its
# weights too, and their A and B are wrong on the published ones.
PLAIN_INITS = ("none", "true", "false", "gaussian", "orthogonal", "eva")


# ---- out


def write_adapter(model: GPT2, folder: Path, replace: bool = False) -> None:
    """Write the adapters of a model, and its head if that is no part of the base.

    replace: remove a whole model that lies in the folder, such as an earlier run's best.
    Raises ValueError if there are no adapters, if they are merged, if something else was trained
    along, or if a whole model lies in the folder that is not to be replaced, or is their base.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no adapter to save: add_lora first, or unmerge_lora")
    check_what_learns(model)
    holds_model = (folder / MODEL_FILES[0]).is_file()
    if holds_model and not replace:
        raise ValueError(
            f"{folder} holds a whole model, to which transformers would apply an adapter beside "
            "it: save the adapter in a folder of its own, or pass replace=True"
        )
    if holds_model:
        check_not_base(model, folder)
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, float]] = {}  # published layer -> (rank, alpha)
    for i in range(model.config.n_layers):
        for published, ours in PUBLISHED_LAYERS.items():
            parts = [layers.get(f"trf_blocks.{i}.{name}") for name in ours]
            if any(parts):
                a, b, alpha = side_by_side(parts, published)
                name = f"transformer.h.{i}.{published}"
                sizes[name] = len(a), alpha
                tensors[f"{PREFIX}{name}.lora_A.weight"] = a
                tensors[f"{PREFIX}{name}.lora_B.weight"] = b
    targets = [name for name in TARGETS if any(n.endswith("." + name) for n in layers)]
    head = trained_head(model)
    tensors |= {f"{PREFIX}score.{name}": p.detach() for name, p in head.items()}
    if "bias" in head:
        logger.warning("PEFT leaves the head's bias out: transformers' classifiers have none")
    notes = {
        "format": "pt",
        "gpt2mini.targets": ",".join(targets),
        "gpt2mini.base": base_note(model),
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    first = next(iter(layers.values()))
    config = as_json(peft_config(first, sizes, model.config.n_layers, bool(head)))
    writable_folder(folder)
    write_together(
        {
            folder / CONFIG: text_writer(config),
            folder / WEIGHTS: partial(save_file, tensors, metadata=notes),
        }
    )
    if holds_model:
        for name in MODEL_FILES:
            (folder / name).unlink(missing_ok=True)


def check_what_learns(model: GPT2) -> None:
    """Raise ValueError if parameters learn that an adapter's files have no place for."""
    lost = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_" not in name and not name.startswith("out_head.")
    ]
    if lost:
        raise ValueError(
            f"an adapter's files hold adapters and a head; {len(lost)} other parameters learn too "
            f"and would be lost: {', '.join(lost[:5])}; merge_lora(model) and save it as a whole, "
            "or set their requires_grad to False if they are as they were"
        )


def check_not_base(model: GPT2, folder: Path) -> None:
    """Raise ValueError if the model in a folder is the adapters' own base."""
    there = GPT2.from_pretrained(folder, dtype=model.tok_emb.weight.dtype)
    if sample(there) == sample(model):
        raise ValueError(
            f"{folder} holds the base model of the adapter: save the adapter in a folder of its own"
        )


def side_by_side(parts: list[LoRALinear | None], published: str) -> tuple[Tensor, Tensor, float]:
    """(A, B, alpha) of one adapter for layers that lie side by side in the published one."""
    present = [part for part in parts if part is not None]
    if len({(part.rank, part.alpha, part.rank_stabilized) for part in present}) > 1:
        raise ValueError(
            f"the adapters that are one in the published {published} differ in rank or alpha, "
            "which PEFT's format has no place for"
        )
    a = torch.cat([part.lora_A.detach() for part in present])  # (k * rank, in)
    rank = present[0].rank
    b = a.new_zeros(len(parts), present[0].out_features, len(a))  # (parts, out, k * rank)
    for number, part in enumerate(present):
        b[parts.index(part), :, number * rank : (number + 1) * rank] = part.lora_B.detach()
    # Times the factor by which the rank grows, so that the scaling stays what it is.
    growth = math.sqrt(len(present)) if present[0].rank_stabilized else len(present)
    return a, b.flatten(0, 1), growth * present[0].alpha


def trained_head(model: GPT2) -> dict[str, nn.Parameter]:
    """The parameters of a head that the base does not have: a classifier's, or a trainable one."""
    head = model.out_head
    if isinstance(head, TiedHead):
        return {}
    parameters = dict(head.named_parameters())
    of_the_base = getattr(head, "out_features", None) == model.config.vocab_size
    if of_the_base and not any(p.requires_grad for p in parameters.values()):
        return {}
    if not isinstance(head, nn.Linear) or head.in_features != model.config.emb_dim:
        raise ValueError(
            f"the output head is {head}: an adapter's files have a place for "
            f"nn.Linear({model.config.emb_dim}, classes)"
        )
    return parameters


def peft_config(
    layer: LoRALinear, sizes: dict[str, tuple[int, float]], n_layers: int, head: bool
) -> dict[str, Any]:
    """The contents of adapter_config.json. layer: one whose rank and alpha stand for all but the
    exceptions; sizes: those of each published layer that has an adapter."""
    published = [p for p in PUBLISHED_LAYERS if any(name.endswith(p) for name in sizes)]
    in_every_block = len(sizes) == n_layers * len(published)
    ranks, alphas = {}, {}
    for name, (rank, alpha) in exceptions(sizes).items():
        if (rank, alpha) != (layer.rank, layer.alpha):
            ranks[name], alphas[name] = rank, alpha
    more = {"rank_pattern": ranks, "alpha_pattern": alphas} if ranks else {}
    return {
        **PLAIN,
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": layer.rank,
        "lora_alpha": layer.alpha,
        "lora_dropout": layer.lora_dropout.p,
        "use_rslora": layer.rank_stabilized,
        "target_modules": published if in_every_block else list(sizes),
        "modules_to_save": ["score"] if head else None,
        "fan_in_fan_out": True,  # the published layers are stored (in, out)
        "inference_mode": True,
        **more,
    }


def exceptions(sizes: dict[str, tuple[int, float]]) -> dict[str, tuple[int, float]]:
    """The sizes by the ends of names, as PEFT looks them up: one for a layer that has the same in
    every block, `attn.c_attn`; else one for each block."""
    found: dict[str, tuple[int, float]] = {}
    for published in PUBLISHED_LAYERS:
        own = {name: size for name, size in sizes.items() if name.endswith(published)}
        different = {*own.values()}
        found |= {published: different.pop()} if len(different) == 1 else own
    return found


def base_note(model: GPT2) -> str:
    """What `check_base` knows a base model by: its dtype, and samples of all but the adapters and a
    head that is saved beside them."""
    is_own = isinstance(model.out_head, nn.Linear) and not trained_head(model)
    head = sample_head(model) if is_own else {}
    return json.dumps({"dtype": str(model.tok_emb.weight.dtype), **sample(model), **head})


def sample(model: GPT2) -> dict[str, list[float]]:
    """A few numbers of every tensor of a model, but of its adapters and its head."""
    return {
        name: numbers_of(parameter)
        for name, parameter in model.named_parameters()
        if "lora_" not in name and not name.startswith("out_head.")
    }


def sample_head(model: GPT2) -> dict[str, list[float]]:
    """The same of a head that is no tied one."""
    return {f"out_head.{name}": numbers_of(p) for name, p in model.out_head.named_parameters()}


def numbers_of(tensor: Tensor) -> list[float]:
    flat = tensor.detach().flatten()
    return flat[[0, len(flat) // 2, -1]].tolist()


# ---- in


@dataclass(frozen=True)
class Adapter:
    """One published layer's A and B, and the numbers that its config gives it."""

    block: int
    published: str
    a: Tensor
    b: Tensor
    alpha: float


def read_adapter(model: GPT2, folder: Path) -> None:
    """Add the adapters of a folder to a model, in place, ready to use or to train on.

    An adapter that PEFT made for `attn.c_attn` becomes one each for query, key and value. A head in
    the folder becomes the model's. Everything but adapters and head is frozen.
    Raises CheckpointError, and leaves the model as it was, if the folder is damaged or belongs to
    another base model; ValueError if the model has adapters already.
    """
    refuse_adapters(model)
    config = read_peft_config(folder)
    tensors, notes = read_adapter_file(folder / WEIGHTS)
    head = {n.removeprefix("score."): tensors.pop(n) for n in [*tensors] if n.startswith("score.")}
    with reading(folder / WEIGHTS):
        adapters = pair_up(tensors, config)
        layers = make_layers(model, adapters, config, notes.get("gpt2mini.targets"))
        check_base(model, notes.get("gpt2mini.base"))
        out_head = make_head(model, head, config)
    for parameter in model.parameters():
        parameter.requires_grad = False
    for name, layer in layers.items():
        replace_layer(model, name, layer)
    if out_head is not None:
        model.out_head = out_head


def read_peft_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no adapter: it has no {CONFIG}")
    with reading(path):
        config = read_json(path)
        for name, expected in PLAIN.items():
            found = config.get(name, expected)
            if found != expected:
                raise CheckpointError(f"{path}: {name} is {found!r}; only {expected!r} is known")
        for name in UNSET:
            if config.get(name):
                found = config[name]
                raise CheckpointError(f"{path}: {name} is {found!r}; only plain LoRA is known")
        init = config.get("init_lora_weights")
        if str(init).lower() not in PLAIN_INITS:
            raise CheckpointError(
                f"{path}: init_lora_weights is {init!r}, which may have changed the base's weights "
                f"too; only those are known that do not: {', '.join(PLAIN_INITS)}"
            )
        if not isinstance(config.get("r"), int) or config["r"] < 1:
            raise CheckpointError(f"{path}: r is {config.get('r')!r}; expected a rank")
        if unknown := {*(config.get("modules_to_save") or [])} - {"score", "classifier"}:
            raise CheckpointError(f"{path}: modules_to_save has {unknown}; only a head is known")
    return config


def read_adapter_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by their names without PEFT's prefix, notes in the header)."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}")
    with reading(path):
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
        stored = read_safetensors(path)
        return {n.removeprefix(PREFIX): tensor.read() for n, tensor in stored.items()}, notes


def pair_up(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[Adapter]:
    """The adapters of a file, each with its A and its B."""
    pairs: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = ADAPTER_NAME.fullmatch(name)
        if not found or found[2] not in PUBLISHED_LAYERS:
            raise ValueError(f"{name} is no adapter of a layer of GPT-2")
        pairs.setdefault((int(found[1]), found[2]), {})[found[3]] = tensor
    if not pairs:
        raise ValueError("it holds no adapter")
    adapters = []
    for (block, published), pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"h.{block}.{published} has only its {next(iter(pair))}")
        rank = pattern(config, "rank_pattern", block, published, config["r"])
        alpha = pattern(config, "alpha_pattern", block, published, config.get("lora_alpha", 8))
        if pair["A"].shape[:1] != (rank,) or pair["B"].shape[1:] != (rank,):
            raise ValueError(
                f"h.{block}.{published} has an A of {tuple(pair['A'].shape)} and a B of "
                f"{tuple(pair['B'].shape)}; the config says rank {rank}"
            )
        adapters.append(Adapter(block, published, pair["A"], pair["B"], alpha))
    return adapters


def pattern(config: dict[str, Any], key: str, block: int, published: str, default: Any) -> Any:
    """An exception that the config makes for some layers, by the ends of their names."""
    name = f"transformer.h.{block}.{published}"
    for expression, value in (config.get(key) or {}).items():
        if re.fullmatch(rf"(.*\.)?({expression})", name):
            return value
    return default


def make_layers(
    model: GPT2, adapters: list[Adapter], config: dict[str, Any], targets: str | None
) -> dict[str, LoRALinear]:
    """The adapted layers, filled, not yet in the model.

    targets: which of query, key and value an adapter written here holds, each its own share of the
    rank; PEFT's own is one adapter that all three have whole.
    """
    layers: dict[str, LoRALinear] = {}
    for adapter in adapters:
        check_shape(model, adapter)
        ours = PUBLISHED_LAYERS[adapter.published]
        wanted = [n for n in ours if targets is None or SHORT_NAMES[n] in targets.split(",")]
        if not wanted:
            raise ValueError(f"its header does not list h.{adapter.block}.{adapter.published}")
        rank = len(adapter.a) if targets is None else len(adapter.a) // len(wanted)
        for number, name in enumerate(wanted):
            first = 0 if targets is None else number * rank
            base = model.trf_blocks[adapter.block].get_submodule(name)
            assert isinstance(base, nn.Linear)
            layers[f"trf_blocks.{adapter.block}.{name}"] = make_layer(
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
    """One of our layers: some ranks of a published adapter, and the outputs of its `number`th
    part."""
    rank = ranks.stop - ranks.start
    stabilized = bool(config.get("use_rslora"))
    share = rank / len(adapter.a)
    alpha = adapter.alpha * (math.sqrt(share) if stabilized else share)
    layer = LoRALinear(base, rank, alpha, config.get("lora_dropout", 0.0), stabilized)
    outputs = slice(number * base.out_features, (number + 1) * base.out_features)
    with torch.no_grad():
        layer.lora_A.copy_(adapter.a[ranks])
        layer.lora_B.copy_(adapter.b[outputs, ranks])
    return layer.train(base.training)


def check_base(model: GPT2, note: str | None) -> None:
    """Raise ValueError if the adapter was trained on other weights than the model's, as far as the
    file tells (PEFT's own do not)."""
    if note is None:
        return
    expected = json.loads(note)
    same_dtype = expected.pop("dtype") == str(model.tok_emb.weight.dtype)
    found = sample(model) | sample_head(model)
    for name, numbers in expected.items():
        if name not in found or not are_one(found[name], numbers, same_dtype):
            raise ValueError(
                f"it was trained on another base model: {name} has {found.get(name)} here and "
                f"{numbers} there"
            )


def are_one(found: list[float], expected: list[float], same_dtype: bool) -> bool:
    """Whether numbers are the same, but that the one, or the other, may have been rounded."""
    a, b = torch.tensor(found), torch.tensor(expected)
    if not same_dtype:
        return torch.allclose(a, b, rtol=1e-2, atol=1e-6)
    # loaded in float32, after it had been saved in fewer bits
    roundings = [torch.float32, torch.float16, torch.bfloat16]
    return any(
        torch.equal(a, b.to(d).float()) or torch.equal(a.to(d).float(), b) for d in roundings
    )


def make_head(model: GPT2, tensors: dict[str, Tensor], config: dict[str, Any]) -> nn.Linear | None:
    """The head that was trained along, or None if there was none."""
    if not tensors:
        if config.get("modules_to_save"):
            raise ValueError("the head that its config lists (modules_to_save) is missing")
        return None
    weight = tensors.get("weight")
    if weight is None or weight.ndim != 2 or weight.shape[1] != model.config.emb_dim:
        raise ValueError(f"its head does not fit a model of width {model.config.emb_dim}")
    classes = getattr(model.out_head, "out_features", len(weight))
    if classes != len(weight) and not isinstance(model.out_head, TiedHead):
        raise ValueError(f"its head has {len(weight)} classes; the model's has {classes}")
    like = model.tok_emb.weight
    own = {
        name: nn.Parameter(t.to(like.device, like.dtype, copy=True)) for name, t in tensors.items()
    }
    return linear(own["weight"], own.get("bias"))
