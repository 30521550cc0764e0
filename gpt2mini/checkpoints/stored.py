"""Tensors in files, not read before they are asked for: one face for every file format.

Each reader gives a dictionary of names and `StoredTensor`s. Shapes are known at once, so a file can
be checked against its config before a byte is allocated for the model; the numbers stay on disk.
"""

import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gpt2mini.checkpoints.names import WRAPPERS
from gpt2mini.checkpoints.origin import Origin
from gpt2mini.config import GPT2Config
from gpt2mini.files import read_json, refuse_placeholder

REMAP_AFTER = 2**24  # bytes
# Where a training program puts the weights beside other things.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module")

# What `write_folder` leaves in a folder, and what PEFT and `save_adapter` leave in another. Never
# both in one: `transformers` would apply the adapter to the model beside it.
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


class CheckpointError(ValueError):
    """Files that do not hold a GPT-2 that can be loaded: missing, damaged or foreign ones."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `read` gives it, maybe as a view of the file: to be copied, not kept."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def transposed(stored: StoredTensor) -> StoredTensor:
    """A matrix with its axes exchanged: from (out, in), as others store it, to (in, out)."""
    return replace(stored, shape=stored.shape[::-1], read=lambda: stored.read().T)


@dataclass(frozen=True)
class Checkpoint:
    """All that is needed to build a model: what a folder says, whatever its format."""

    folder: Path
    config: GPT2Config
    tensors: dict[str, StoredTensor]  # under the published names, without wrappers
    tied: bool = True  # whether an output head that equals the token embedding is the embedding
    origin: Origin = field(default_factory=Origin)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside is a CheckpointError that names the file.

    All of it: the libraries that parse these formats answer a damaged file with a dozen kinds of
    exception.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise CheckpointError(f"{path} cannot be read: {kind}{error}") from error


def holds_adapter(folder: Path) -> bool:
    """Whether an adapter lies in a folder, and no whole model."""
    return (folder / ADAPTER_FILES[0]).is_file() and not (folder / MODEL_FILES[0]).is_file()


class Remapped:
    """A file of tensors that is mapped into memory anew now and then.

    Every page of a mapping that was read counts as memory in use until the mapping goes. So when
    some megabytes have been read, and copied, a fresh mapping takes its place.
    """

    def __init__(self, open_file: Callable[[], Callable[[str], Tensor]]) -> None:
        self.open_file = open_file
        self.get: Callable[[str], Tensor] | None = None
        self.bytes_read = 0
        self.lock = Lock()

    def read(self, name: str) -> Tensor:
        with self.lock:
            if self.get is None or self.bytes_read > REMAP_AFTER:
                self.get, self.bytes_read = self.open_file(), 0
            tensor = self.get(name)
            self.bytes_read += tensor.nbytes
        return tensor


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file."""
    with reading(path):
        refuse_placeholder(path)
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        mapped = Remapped(lambda: safe_open(path, framework="pt").get_tensor)
    return {
        name: StoredTensor(path, shape, partial(mapped.read, name))
        for name, shape in shapes.items()
    }


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file that `torch.save` wrote. Nothing in it is executed.

    Files from before torch 1.6 (OpenAI's on the Hub are such) cannot be mapped, and are read whole.
    """
    with reading(path):
        refuse_placeholder(path)
        if zipfile.is_zipfile(path):
            shapes = {name: tuple(t.shape) for name, t in load_state_dict(path, mmap=True).items()}
            mapped = Remapped(lambda: load_state_dict(path, mmap=True).__getitem__)
            return {
                name: StoredTensor(path, shape, partial(mapped.read, name))
                for name, shape in shapes.items()
            }
        return {
            name: StoredTensor(path, tuple(tensor.shape), partial(torch.Tensor.detach, tensor))
            for name, tensor in load_state_dict(path, mmap=False).items()
        }


def check_archive(path: Path) -> None:
    """Refuse an archive that is compressed: torch maps what lies in it as numbers."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} holds compressed data; files of torch.save do not")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(f"{path} claims to hold more data than the file has")


def load_torch_file(path: Path, mmap: bool) -> Any:
    """Whatever `torch.save` wrote of tensors, numbers, texts, lists and dictionaries."""
    if zipfile.is_zipfile(path):
        check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:  # whose text advises to read the file unsafely
        raise CheckpointError(
            f"{path} holds more than tensors, or is damaged: expected a state dict that torch.save "
            "has written; nothing else in it is executed"
        ) from error


def load_state_dict(path: Path, mmap: bool) -> dict[str, Tensor]:
    """A dictionary of ordinary tensors: the whole file, or what lies in it under a usual key."""
    contents = load_torch_file(path, mmap)
    if isinstance(contents, dict):
        inner = [contents[key] for key in STATE_DICT_KEYS if isinstance(contents.get(key), dict)]
        contents = inner[0] if inner else contents
    if not isinstance(contents, dict):
        raise CheckpointError(
            f"{path} holds a {type(contents).__name__}; expected a dictionary of tensors"
        )
    for name, tensor in contents.items():
        ordinary = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not isinstance(name, str) or not ordinary or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name!r} is no ordinary tensor with a name")
    return dict(contents)


def read_shards(
    index: Path, read_file: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    """The tensors of several files, which an index of names and file names lists."""
    with reading(index):
        tensors: dict[str, StoredTensor] = {}
        for file_name in shards(index):
            shard = read_file(file_beside(index, file_name))
            if twice := sorted(tensors.keys() & shard.keys()):
                raise CheckpointError(f"{index}: {twice[0]} is in two of the files")
            tensors |= shard
    for name, file_name in read_json(index)["weight_map"].items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise CheckpointError(f"{index}: {name} is not in {file_name}, where it should be")
    return tensors


def file_beside(path: Path, name: object) -> Path:
    """A file that another one names, which has to lie in the same folder."""
    name = check_name(path, name)
    if not (path.parent / name).is_file():
        raise CheckpointError(f"{path} refers to {name}, which is missing")
    return path.parent / name


def check_name(path: Path, name: object) -> str:
    """The name of a file in the folder of `path`, or CheckpointError."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:\0"):
        raise CheckpointError(f"{path} refers to {name!r}: expected a file in the same folder")
    return name


def without_wrappers(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Names as published: what DataParallel, Lightning, torch.compile and `transformers` add
    is taken off."""
    plain: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        short = WRAPPERS.sub("", name)
        if short in plain:
            raise CheckpointError(f"{tensor.file}: {short} is there twice, also as {name}")
        plain[short] = tensor
    return plain


# A folder's weights, in the order of preference: (file, how it is read).
WEIGHT_FILES: dict[str, Callable[[Path], dict[str, StoredTensor]]] = {
    "model.safetensors": read_safetensors,
    "model.safetensors.index.json": lambda path: read_shards(path, read_safetensors),
    "pytorch_model.bin": read_torch_file,
    "pytorch_model.bin.index.json": lambda path: read_shards(path, read_torch_file),
}


def weight_file(available: Iterable[str]) -> str | None:
    """Of the files of a folder, the one that is read for the weights; None: there is none."""
    present = set(available)
    return next((name for name in WEIGHT_FILES if name in present), None)


def shards(index: Path) -> list[str]:
    """The names of the files that an index lists."""
    with reading(index):
        weight_map = read_json(index)["weight_map"]
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: weight_map is not an object of tensor -> file name")
        return sorted({check_name(index, name) for name in weight_map.values()})


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a Hugging Face folder, in whichever form it has them."""
    name = weight_file(file.name for file in folder.iterdir())
    if name is not None:
        return without_wrappers(WEIGHT_FILES[name](folder / name))
    found = sorted(file.name for file in folder.iterdir())
    raise CheckpointError(
        f"{folder} has no weights: expected one of {', '.join(WEIGHT_FILES)}; found {found}"
    )
