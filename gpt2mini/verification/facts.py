"""What a fact is: what is expected of a model, where that is published, and how it is looked up in
the model on this machine."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from gpt2mini.checkpoints import find_model
from gpt2mini.evaluation import zero_shot
from gpt2mini.evaluation.table import Row
from gpt2mini.evaluation.task_files import find_task_file
from gpt2mini.model import GPT2
from gpt2mini.tokenizer import Tokenizer


class Unavailable(Exception):
    """A fact cannot be checked here: a file is missing, or there is no network. The text says
    which."""


@dataclass
class Installation:
    """A model on this machine, read when a fact first asks for it, and computed with in float32.

    name: its name or folder. data: a folder with the files of the evaluation tasks; None: they are
    downloaded once.
    """

    name: str | Path
    device: torch.device | str = "cpu"
    data: str | Path | None = None
    progress: bool = False
    measured: dict[tuple[str, int | None], list[Row]] = field(default_factory=dict)

    @cached_property
    def folder(self) -> Path:
        return find_model(self.name)

    @cached_property
    def model(self) -> GPT2:
        return GPT2.from_pretrained(self.name, device=self.device)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_pretrained(self.name)

    def task_file(self, task: str) -> Path:
        """Raises Unavailable if there is none."""
        try:
            return find_task_file(task, self.data)
        except (FileNotFoundError, ConnectionError) as error:
            raise Unavailable(str(error)) from None

    def measure(self, task: str, stride: int | None) -> list[Row]:
        """The figures of a zero-shot task; several facts share one measurement."""
        if (task, stride) not in self.measured:
            files = {task: self.task_file(task)}
            table = zero_shot(
                self.model, self.tokenizer, files, stride=stride, progress=self.progress
            )
            self.measured[task, stride] = table.rows
        return self.measured[task, stride]


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A kind of fact is a subclass: how the value is found, and when it agrees.

    expected: of a type that JSON has, as in a card's file. source: where it is published. remark:
    in what the setting differs from the source's, and whence the tolerance.
    """

    expected: Any
    source: str = ""
    remark: str = ""

    is_slow: ClassVar[bool] = False  # takes minutes, or hours

    @property
    def title(self) -> str:
        raise NotImplementedError

    def find(self, installation: Installation) -> Any:
        """The value here. Raises Unavailable if it cannot be had."""
        raise NotImplementedError

    def agrees(self, found: Any) -> bool:
        return bool(found == self.expected)

    @property
    def expected_text(self) -> str:
        """For a column of a table."""
        return str(self.expected)

    def found_text(self, found: Any) -> str:
        """For a column of a table."""
        return str(found)

    def difference(self, found: Any) -> str:
        """What does not agree, in words, where the two columns do not say it."""
        return ""


@dataclass(frozen=True, kw_only=True)
class Figure(Fact):
    """A number, with the tolerance within which it agrees."""

    tolerance: float

    def agrees(self, found: Any) -> bool:
        return abs(found - self.expected) <= self.tolerance

    @property
    def expected_text(self) -> str:
        return f"{self.expected:g} ± {self.tolerance:g}"

    def found_text(self, found: Any) -> str:
        return f"{found:.6g}"
