"""Stored tensors -> model: checked before anything is allocated, copied once.

The model's weights are copies, never the mapped file itself, although a mapped file costs no copy:
whoever writes into the file later would change the numbers of the model that was loaded from it,
and whoever shortens it would end the process (SIGBUS).
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gpt2mini.checkpoints.names import (
    CLASS_HEAD,
    CLASS_HEAD_BIAS,
    OWN_HEAD,
    Rule,
    check_names,
    from_published,
    published_shape,
    rules,
)
from gpt2mini.checkpoints.origin import Samples, first_middle_last, remember_origin
from gpt2mini.checkpoints.stored import Checkpoint, CheckpointError, StoredTensor, reading
from gpt2mini.device import WEIGHT_DTYPES
from gpt2mini.model import GPT2


@torch.inference_mode(False)  # which threads do not inherit, and whose tensors cannot be trained
def build_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> GPT2:
    """The model of a checkpoint, in eval mode. Uses the checkpoint up: what has been copied is let
    go."""
    config, tensors = checkpoint.config, checkpoint.tensors
    head = choose_head(checkpoint, tensors)
    classes = tensors["score.weight"].shape[0] if head and head[0] in CLASS_HEAD else 0
    table = check(checkpoint, tensors, head, classes)
    with device, Unfilled(dtype):
        model = GPT2(config)
        if head:
            outputs = classes or config.vocab_size
            model.out_head = nn.Linear(config.emb_dim, outputs, bias=len(head) > 1)
    parameters = dict(model.named_parameters())

    @torch.no_grad()
    def fill(rule: Rule) -> None:
        stored = tensors.pop(rule.published)
        with reading(stored.file):
            tensor = stored.read()
            if tensor.dtype not in WEIGHT_DTYPES:
                raise ValueError(
                    f"{rule.published} holds {tensor.dtype}; expected weights of 16, 32 or 64 bits"
                )
            if rule.transposed and tensor.itemsize >= dtype.itemsize:
                # torch rounds and transposes at once two to four times slower than one by one
                tensor = tensor.to(dtype)
            for name, part in zip(rule.ours, from_published(rule, tensor), strict=True):
                parameters[name].copy_(part)

    # The largest alone and first, while little memory is in use: it is there twice for a moment.
    for rule in table:
        if "vocab" in rule.shape:
            fill(rule)
    # Half of the time goes to the system, which has to hand out fresh memory page by page: it does
    # so for several threads at once.
    with ThreadPoolExecutor(max_workers=4) as threads:
        list(threads.map(fill, [rule for rule in table if "vocab" not in rule.shape]))
    remember_origin(model, replace(checkpoint.origin, samples=weight_samples(model)))
    return model.eval()


def weight_samples(model: GPT2) -> Samples:
    """Three values of every parameter; nothing where there are no values."""
    if model.tok_emb.weight.is_meta:
        return {}
    return {name: first_middle_last(parameter) for name, parameter in model.named_parameters()}


def choose_head(checkpoint: Checkpoint, tensors: dict[str, StoredTensor]) -> list[Rule]:
    """Which output head the file has: classes, one of its own, or ([]) the token embedding.

    A second copy of the embedding, under either name, is taken out of `tensors`.
    """
    if "score.weight" in tensors:
        return CLASS_HEAD + (CLASS_HEAD_BIAS if "score.bias" in tensors else [])
    own, embedding = tensors.get("lm_head.weight"), tensors.get("wte.weight")
    if not checkpoint.tied:
        return OWN_HEAD
    if own is None:
        return []
    if embedding is None:
        tensors["wte.weight"] = tensors.pop("lm_head.weight")
        return []
    with reading(own.file):
        if own.shape == embedding.shape and torch.equal(own.read(), embedding.read()):
            del tensors["lm_head.weight"]
            return []
    return OWN_HEAD  # the config calls them tied, and they are not: the numbers count


def check(
    checkpoint: Checkpoint, tensors: dict[str, StoredTensor], head: list[Rule], classes: int
) -> list[Rule]:
    """The table for this checkpoint, with the certainty that its tensors fit: names and shapes."""
    config, source = checkpoint.config, describe(checkpoint)
    if config.n_layers > len(tensors):  # or the table itself would be endless
        raise CheckpointError(
            f"{source}: the config asks for {config.n_layers} blocks; "
            f"there are only {len(tensors)} tensors"
        )
    table = rules(config, head)
    try:
        check_names(tensors, table)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    for rule in table:
        found, expected = tensors[rule.published], published_shape(rule, config, classes)
        if found.shape != expected:
            raise CheckpointError(
                f"{found.file}: {rule.published} has the shape {found.shape}; "
                f"the config asks for {expected}"
            )
    return table


def describe(checkpoint: Checkpoint) -> str:
    """The files that the tensors come from."""
    files = sorted({stored.file for stored in checkpoint.tensors.values()})
    return str(files[0]) if len(files) == 1 else f"{checkpoint.folder} ({len(files)} files)"


class Unfilled(TorchFunctionMode):
    """Make modules without numbers in them: no random initialization, memory of one dtype only.

    (Building on the meta device would do the same, but its random functions import torch's
    compiler: 800 modules and several seconds, for a model of any size.)
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if func in (torch.empty, torch.ones, torch.zeros) and kwargs.get("dtype") is None:
            kwargs["dtype"] = self.dtype
        return func(*args, **kwargs)
