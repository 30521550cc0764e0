"""Facts about what a model consists of: files, hyperparameters, weights, vocabulary."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2mini.verification.facts import Fact, Installation, Unavailable

PIECE = 2**24  # bytes of a file that are read at a time
NAMED = 4  # tensors that a message names


@dataclass(frozen=True, kw_only=True)
class FileChecksum(Fact):
    """The sha256 of a file, byte for byte.

    files: names under which it is published, of which the first that is there counts.
    """

    files: list[str]

    @property
    def title(self) -> str:
        return f"sha256 of {' or '.join(self.files)}"

    def find(self, installation: Installation) -> str:
        for name in self.files:
            if (installation.folder / name).is_file():
                return sha256_of_file(installation.folder / name)
        raise Unavailable(f"{' or '.join(self.files)} is not in {installation.folder}")

    @property
    def expected_text(self) -> str:
        return f"{self.expected[:12]}..."

    def found_text(self, found: str) -> str:
        return f"{found[:12]}..."

    def difference(self, found: str) -> str:
        return (
            "the file is damaged, another one, or was saved again by a program that writes other "
            "bytes for the same numbers"
        )


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Hyperparameters(Fact):
    """The fields of the config, those that are expected."""

    @property
    def title(self) -> str:
        return "hyperparameters"

    def find(self, installation: Installation) -> dict[str, Any]:
        config = asdict(installation.model.config)
        return {name: config.get(name) for name in self.expected}

    @property
    def expected_text(self) -> str:
        return f"{len(self.expected)} fields"

    def found_text(self, found: dict[str, Any]) -> str:
        same = sum(found[name] == value for name, value in self.expected.items())
        return f"{same} the same"

    def difference(self, found: dict[str, Any]) -> str:
        changed = [name for name, value in self.expected.items() if found[name] != value]
        return "; ".join(
            f"{name} is {found[name]}, expected {self.expected[name]}" for name in changed
        )


@dataclass(frozen=True, kw_only=True)
class ParameterCount(Fact):
    @property
    def title(self) -> str:
        return "parameters"

    def find(self, installation: Installation) -> int:
        return sum(parameter.numel() for parameter in installation.model.parameters())

    @property
    def expected_text(self) -> str:
        return f"{self.expected:,}"

    def found_text(self, found: int) -> str:
        return f"{found:,}"


@dataclass(frozen=True, kw_only=True)
class TensorDigests(Fact):
    """A digest of the numbers of each tensor, by its name in the model.

    The same numbers in another file format, layout or a wider dtype have the same digests; rounded
    to a narrower dtype, other ones.
    """

    @property
    def title(self) -> str:
        return "tensors, by digests"

    def find(self, installation: Installation) -> dict[str, str]:
        state = installation.model.state_dict()
        return {name: digest_of(tensor) for name, tensor in state.items()}

    @property
    def expected_text(self) -> str:
        return f"{len(self.expected)} tensors"

    def found_text(self, found: dict[str, str]) -> str:
        return f"{len(found.items() & self.expected.items())} the same"

    def difference(self, found: dict[str, str]) -> str:
        common = [name for name in self.expected if name in found]
        kinds = {
            "changed": [name for name in common if found[name] != self.expected[name]],
            "missing": [name for name in self.expected if name not in found],
            "not expected": [name for name in found if name not in self.expected],
        }
        parts = [f"{kind}: {some(names)}" for kind, names in kinds.items() if names]
        if len(kinds["changed"]) == len(common) == len(found) > 1:
            parts.append("another model of this shape, or this one rounded to a narrower dtype")
        return "; ".join(parts)


def some(names: list[str]) -> str:
    """The first names, and how many there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def digest_of(tensor: Tensor) -> str:
    """sha256 of the numbers in float32, row by row, the lowest byte first."""
    numbers = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.sha256(numbers.astype("<f4").tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class VocabularyDigests(Fact):
    """Digests of a tokenizer's tokens with their ids, and of its merges."""

    @property
    def title(self) -> str:
        return "vocabulary and merges, by digests"

    def find(self, installation: Installation) -> dict[str, str]:
        tokenizer = installation.tokenizer
        parts = {"vocabulary": sorted(tokenizer.vocab.items()), "merges": tokenizer.merges}
        return {
            name: hashlib.sha256(json.dumps(part).encode()).hexdigest()
            for name, part in parts.items()
        }

    @property
    def expected_text(self) -> str:
        return f"{len(self.expected)} digests"

    def found_text(self, found: dict[str, str]) -> str:
        return f"{len(found.items() & self.expected.items())} the same"

    def difference(self, found: dict[str, str]) -> str:
        changed = [name for name, digest in self.expected.items() if found.get(name) != digest]
        return f"changed: {', '.join(changed)} of the tokenizer"
