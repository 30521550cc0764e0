"""Adapters -> files."""

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpt2mini.checkpoints.stored import MODEL_FILES
from gpt2mini.files import as_json, text_writer, writable_folder, write_together
from gpt2mini.lora.adapt import TARGETS, lora_layers
from gpt2mini.lora.base_model import base_note, sample, trained_head
from gpt2mini.lora.layers import LoRALinear
from gpt2mini.lora.peft_format import CONFIG, PLAIN, PREFIX, PUBLISHED_LAYERS, WEIGHTS
from gpt2mini.model import GPT2

logger = logging.getLogger(__name__)


def save_adapter(model: GPT2, folder: str | Path, replace: bool = False) -> None:
    """Write the adapters of a model, and its head if that is no part of the base.

    replace: remove a whole model that lies in the folder, such as an earlier run's best.
    Raises ValueError if there are no adapters, if they are merged, if something else was trained
    along, or if a whole model lies in the folder that is not to be replaced, or is their base.
    """
    folder = Path(folder)
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
