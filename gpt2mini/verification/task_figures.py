"""Facts that an evaluation measures: published figures of zero-shot tasks."""

from dataclasses import dataclass
from typing import ClassVar

from gpt2mini.verification.facts import Figure, Installation, Unavailable


@dataclass(frozen=True, kw_only=True)
class TaskFigure(Figure):
    """A figure of `gpt2mini evaluate --tasks`.

    metric and setting: which of the task's figures; `setting` is how that of its row begins.
    lines: of the task's whole file; a part of it gives another figure. stride: of sliding windows;
    None: rolling ones.
    """

    task: str
    metric: str
    setting: str
    lines: int
    stride: int | None = None

    is_slow: ClassVar[bool] = True

    @property
    def title(self) -> str:
        return f"{self.task}: {self.metric}, {self.setting}"

    def find(self, installation: Installation) -> float:
        path = installation.task_file(self.task)
        with path.open("rb") as file:
            lines = sum(1 for _ in file)
        if lines != self.lines:
            raise Unavailable(
                f"{path} has {lines:,} lines; the figure is for a file of {self.lines:,}"
            )
        rows = installation.measure(self.task, self.stride)
        return next(
            row.value
            for row in rows
            if row.metric == self.metric and row.setting.startswith(self.setting)
        )
