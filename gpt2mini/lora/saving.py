"""Adapters -> files in PEFT's format (see `gpt2mini.lora.peft_format`)."""

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpt2mini.checkpoints.stored import MODEL_FILES
from gpt2mini.files import as_json, local_path, text_writer, writable_folder, write_together
from gpt2mini.lora.adapt import TARGETS, lora_layers, trainable_beside_adapters
from gpt2mini.lora.base_model import (
    base_fingerprint,
    base_values,
    name_of_base,
    predicts_tokens,
    trained_head,
)
from gpt2mini.lora.layers import LoRALinear
from gpt2mini.lora.peft_format import (
    CLASS_HEAD,
    CONFIG,
    PLAIN,
    PREFIX,
    PUBLISHED_LAYERS,
    TASKS,
    TOKEN_HEAD,
    WEIGHTS,
    WEIGHTS_BIN,
)
from gpt2mini.model import GPT2

logger = logging.getLogger(__name__)

Size = tuple[int, float]  # rank and alpha


def save_adapter(
    model: GPT2, folder: str | Path, replace: bool = False, base_model: str | None = None
) -> None:
    """Write the active adapter of a model, and its head if that is not part of the base.

    base_model: what the files name as the base, by which PEFT and transformers find it: a
    repository on the Hub, or a folder. The default is what the model was loaded from, a local
    folder with its full path on this machine; nothing if its weights have changed since then.
    replace: remove a whole model from the folder, such as an earlier run's best.
    Raises ValueError if there are no adapters, if they are merged or not plain LoRA, if other
    parameters are trainable, or if the folder holds a whole model and `replace` is False, or the
    adapters' own base.
    """
    folder = local_path(folder)
    layers = lora_layers(model)
    check_saveable(model, layers)
    holds_model = check_folder(model, folder, replace)
    tensors, sizes = published_adapters(model, layers)
    head = trained_head(model)
    if "bias" in head:
        logger.warning("PEFT leaves the head's bias out: transformers' heads have none")
    kind = (TOKEN_HEAD if predicts_tokens(model) else CLASS_HEAD) if head else None
    tensors |= {f"{PREFIX}{kind}.{name}": p.detach() for name, p in head.items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    targets = [name for name, path in TARGETS.items() if any(n.endswith(path) for n in layers)]
    metadata = {
        "format": "pt",
        "gpt2mini.targets": ",".join(targets),
        "gpt2mini.base": base_fingerprint(model),
    }
    first = next(iter(layers.values()))
    config = peft_config(first, sizes, model.config.n_layers, kind)
    config["base_model_name_or_path"] = base_model or name_of_base(model)
    writable_folder(folder)
    write_together(
        {
            folder / CONFIG: text_writer(as_json(config)),
            folder / WEIGHTS: partial(save_file, tensors, metadata=metadata),
        }
    )
    (folder / WEIGHTS_BIN).unlink(missing_ok=True)  # of another adapter
    if holds_model:
        for name in MODEL_FILES:
            (folder / name).unlink(missing_ok=True)


def check_saveable(model: GPT2, layers: dict[str, LoRALinear]) -> None:
    """Raise ValueError for what an adapter's files have no place for."""
    if not layers:
        raise ValueError("the model has no adapter to save: add_lora first, or unmerge_lora")
    other_kinds = {type(x).__name__ for x in layers.values() if type(x) is not LoRALinear}
    if other_kinds:
        raise ValueError(
            f"an adapter's files hold plain LoRA, not {', '.join(sorted(other_kinds))}: "
            "merge_lora(model) and save it as a whole"
        )
    beside = trainable_beside_adapters(model)
    if lost := [name for name in beside if not name.startswith("out_head.")]:
        raise ValueError(
            f"an adapter's files hold adapters and a head; {len(lost)} other parameters are "
            f"trainable and would be lost: {', '.join(lost[:5])}; merge_lora(model) and save it as "
            "a whole, or set their requires_grad to False if they are unchanged"
        )


def check_folder(model: GPT2, folder: Path, replace: bool) -> bool:
    """Whether the folder holds a whole model. Raises ValueError if that is not to be replaced, or
    is the base of the adapters."""
    if not (folder / MODEL_FILES[0]).is_file():
        return False
    if not replace:
        raise ValueError(
            f"{folder} holds a whole model, to which transformers would apply an adapter beside "
            "it: save the adapter in a folder of its own, or pass replace=True"
        )
    present = GPT2.from_pretrained(folder, dtype=model.tok_emb.weight.dtype)
    if base_values(present) == base_values(model):
        raise ValueError(
            f"{folder} holds the base model of the adapter: save the adapter in a folder of its own"
        )
    return True


def published_adapters(
    model: GPT2, layers: dict[str, LoRALinear]
) -> tuple[dict[str, Tensor], dict[str, Size]]:
    """(tensors by PEFT's names, rank and alpha by the published layers' names)."""
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, Size] = {}
    for i in range(model.config.n_layers):
        for published, ours in PUBLISHED_LAYERS.items():
            parts = [layers.get(f"trf_blocks.{i}.{name}") for name in ours]
            if any(parts):
                a, b, alpha = side_by_side(parts, published)
                name = f"transformer.h.{i}.{published}"
                sizes[name] = len(a), alpha
                tensors[f"{PREFIX}{name}.lora_A.weight"] = a
                tensors[f"{PREFIX}{name}.lora_B.weight"] = b
    return tensors, sizes


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
    layer: LoRALinear, sizes: dict[str, Size], n_layers: int, head: str | None
) -> dict[str, Any]:
    """The contents of adapter_config.json. layer: its rank and alpha are the config's own, and
    other sizes are written as patterns."""
    published = [p for p in PUBLISHED_LAYERS if any(name.endswith(p) for name in sizes)]
    in_every_block = len(sizes) == n_layers * len(published)
    other = {n: s for n, s in size_patterns(sizes).items() if s != (layer.rank, layer.alpha)}
    patterns = {
        "rank_pattern": {name: rank for name, (rank, _) in other.items()},
        "alpha_pattern": {name: alpha for name, (_, alpha) in other.items()},
    }
    return {
        **PLAIN,
        "task_type": TASKS[head or TOKEN_HEAD],
        "base_model_name_or_path": None,
        "r": layer.rank,
        "lora_alpha": layer.alpha,
        "lora_dropout": layer.lora_dropout.p,
        "use_rslora": layer.rank_stabilized,
        "target_modules": published if in_every_block else list(sizes),
        "modules_to_save": [head] if head else None,
        "fan_in_fan_out": True,  # the published layers are stored (in, out)
        "inference_mode": True,
        **(patterns if other else {}),
    }


def size_patterns(sizes: dict[str, Size]) -> dict[str, Size]:
    """Sizes by the ends of names, as PEFT looks them up: one entry, `attn.c_attn`, for a layer of
    the same size in every block, else one for each block."""
    patterns: dict[str, Size] = {}
    for published in PUBLISHED_LAYERS:
        own = {name: size for name, size in sizes.items() if name.endswith(published)}
        different = {*own.values()}
        patterns |= {published: different.pop()} if len(different) == 1 else own
    return patterns
