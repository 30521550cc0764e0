"""Weights and optimizer states on disk, by name, for any world size.

With torch.distributed.checkpoint (DCP) every rank writes its shard of each tensor, and a run of
another world size can read them. DCP's index is a pickle, which could call any function: the reader
here first checks which classes the pickle names, and refuses all but those of an index.
(Importing DCP takes a second, which only runs that save or resume should spend, so this module is
imported where it is used.)
"""

import pickle
import warnings
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer


def tensors_of(model: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """Trainable parameters, buffers, and the optimizers' state of each parameter."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    tensors = {f"model.{name}": p for p, name in names.items() if p.requires_grad}
    saved = model.state_dict().keys()
    tensors |= {f"model.{name}": b for name, b in model.named_buffers() if name in saved}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{names[parameter]}.{key}"] = value
                elif value is not None:
                    raise TypeError(
                        f"{type(optimizer).__name__} keeps {key!r} as {type(value).__name__}; only "
                        "tensors can be saved: use an optimizer whose state is made of tensors"
                    )
    return tensors


def save_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Raises OSError if they cannot be written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a single process without a process group
        try:
            checkpoint.save(tensors, checkpoint_id=folder)
        except CheckpointException as error:  # not a subclass of Exception
            raise OSError(reason(error)) from error


def load_tensors(folder: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Read weights in place, and optimizer states into fresh tensors like their parameters.

    Raises ValueError if the trainable parameters have other names or shapes, or the files cannot be
    read.
    """
    reader = SafeReader(folder)
    facts = reader.read_metadata().state_dict_metadata.items()
    stored = {n: f for n, f in facts if isinstance(f, metadata.TensorStorageMetadata)}
    tensors = tensors_of(model, [])
    check_same({name: f.size for name, f in stored.items() if name.startswith("model.")}, tensors)
    parameters = dict(model.named_parameters())
    states: dict[nn.Parameter, dict[str, Tensor]] = {}
    for full_name, of_state in stored.items():
        if full_name.startswith("optimizer.") and optimizers:
            name, key = full_name.removeprefix("optimizer.").rsplit(".", 1)
            empty = empty_state(parameters[name], of_state.size, of_state.properties.dtype)
            tensors[full_name] = states.setdefault(parameters[name], {})[key] = empty
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            checkpoint.load(tensors, storage_reader=reader)
        except CheckpointException as error:
            raise ValueError(reason(error)) from error
    for optimizer in optimizers:
        give_states(optimizer, states)


def reason(error: CheckpointException) -> str:
    """The error of the first rank that failed."""
    return str(next(iter(error.failures.values()))[0])


def check_same(stored: dict[str, torch.Size], tensors: dict[str, Tensor]) -> None:
    expected = {name: tensor.shape for name, tensor in tensors.items()}
    if stored != expected:
        differing = sorted({name for name, _ in stored.items() ^ expected.items()})
        raise ValueError(f"it belongs to another model; these differ: {', '.join(differing[:5])}")


def empty_state(parameter: nn.Parameter, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """An empty moving average, sharded as its parameter is, or an empty scalar."""
    if shape == parameter.shape:
        return torch.empty_like(parameter, requires_grad=False, dtype=dtype)
    return torch.empty(shape, dtype=dtype)


def give_states(optimizer: Optimizer, states: dict[nn.Parameter, dict[str, Tensor]]) -> None:
    """Through `load_state_dict`, which moves each state to the device its optimizer needs."""
    blank = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in blank["param_groups"] for number in group["params"]]
    pairs = zip(numbers, parameters, strict=True)
    blank["state"] = {number: states[p] for number, p in pairs if p in states}
    optimizer.load_state_dict(blank)


HARMLESS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}


def enum_member(kind: Any, name: str) -> Enum:
    """Stands in for `getattr`, with which Python 3.11.0 to 3.11.3 pickles members of an Enum, and
    gives nothing else."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"it asks for {kind}.{name}, which no checkpoint needs")


class IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return enum_member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        defines = {metadata.__name__: metadata, filesystem.__name__: filesystem}.get(module)
        kind = getattr(defines, name, None)
        is_part_of_an_index = isinstance(kind, type) and kind.__module__ == module
        if is_dtype or is_part_of_an_index or (module, name) in HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


class SafeReader(FileSystemReader):
    """Raises pickle.UnpicklingError for an index that names any other class."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        with (self.folder / ".metadata").open("rb") as file:
            IndexUnpickler(file).load()
        return super().read_metadata(*args, **kwargs)
