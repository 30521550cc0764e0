"""What does a run learn from? Hashes by which a resumed run recognizes its batches."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from gpt2mini.checkpoints.origin import Samples, first_middle_last
from gpt2mini.training.batches import GeneratorsAtStart
from gpt2mini.training.checkpoints import generator_states, restore_generators
from gpt2mini.training.distributed import whole_tensor

POSITION = "next_epoch"  # where a loop of your own stands; `train` begins with the first


def fingerprint(batches: Iterable[Any]) -> dict[str, str]:
    """A hash of each public attribute of the batches (tokens, rows, seed, batch_size ...) by its
    name, and one of the first batch.

    Batches with a method `fingerprint` give their own hashes, a dict. A list is hashed as a whole.
    Of batches that have a state, or can be read only once, the first one is not read.
    """
    if hasattr(batches, "fingerprint"):
        return batches.fingerprint()
    if isinstance(batches, list | tuple):
        return {"batches": digest(batches)}
    attributes = getattr(batches, "__dict__", {}).items()
    public = {name: of for name, of in attributes if name[0] != "_" and name != POSITION}
    found = {name: digest(value) for name, value in public.items()}
    if hasattr(batches, "load_state_dict") or isinstance(batches, Iterator):
        return found
    return found | {"first batch": digest_of_first(batches)}


def samples_of_frozen(model: nn.Module) -> Samples:
    """Three values of every parameter that is not trained, by which another model is noticed."""
    frozen = ((name, p) for name, p in model.named_parameters() if not p.requires_grad)
    return {name: first_middle_last(whole_tensor(p)) for name, p in frozen if p.numel()}


def digest_of_first(batches: Iterable[Any]) -> str:
    states, own = generator_states(), GeneratorsAtStart(batches)
    first = next(iter(batches.part(0, 1) if hasattr(batches, "part") else batches), None)
    restore_generators(states)  # shuffled batches may have drawn from them
    own.restore()
    return digest(getattr(first, "__dict__", first))


def digest(value: Any) -> str:
    found = hashlib.sha256()
    for part in parts(value):
        found.update(part)
    return found.hexdigest()[:16]


def parts(value: Any) -> Iterator[Any]:
    """The bytes of integers, texts, tensors and arrays of integers, and of lists, dicts and objects
    of ours that hold them. Floats may differ in the last bit the next time, where a model has
    computed them: of them only the shape counts. Of other objects it is their class."""
    yield type(value).__name__.encode()
    if isinstance(value, Tensor | np.ndarray):
        yield repr(tuple(value.shape)).encode()
        if is_whole(value):
            array = value.cpu().numpy() if isinstance(value, Tensor) else value
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    elif isinstance(value, str | int | bytes | range | Path):
        yield repr(value).encode()
    elif isinstance(value, dict | list | tuple):
        for item in value.items() if isinstance(value, dict) else value:
            yield from parts(item)
    elif is_dataclass(value) or type(value).__module__.startswith("gpt2mini."):
        yield from parts(getattr(value, "__dict__", {}))


def is_whole(value: Tensor | np.ndarray) -> bool:
    """Whether the elements are integers or booleans."""
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex())
    return value.dtype.kind in "iub"
