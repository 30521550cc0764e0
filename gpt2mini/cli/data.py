"""What jobs read: records, and their split into those to learn from and those held out."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2mini.data.instructions import TEMPLATES
from gpt2mini.data.records import HUB

RECORDS = "records (.jsonl, .json, .csv, hf:owner/name)"


def holds_records(data: str) -> bool:
    return data.startswith(HUB) or Path(data).suffix.lower() in (".jsonl", ".json", ".csv")


@dataclass(frozen=True)
class RecordFlags:
    """How records are read."""

    columns: str | None = None  # fields called otherwise: ours=theirs,ours=theirs
    template: str = "plain"  # of a prompt: plain, alpaca, or your own with {prompt}

    def read(self, source: str, read: Callable[[str, str, dict[str, str]], list[Any]]) -> list[Any]:
        template = TEMPLATES.get(self.template, self.template)
        return read(source, template, parse_columns(self.columns))


def parse_columns(columns: str | None) -> dict[str, str]:
    """prompt=question,completion=answer -> what our names are called in the data."""
    pairs = [pair.split("=") for pair in columns.split(",")] if columns else []
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise ValueError(f"--columns must read ours=theirs,ours=theirs, not {columns!r}")
    found = {ours.strip(): theirs.strip() for ours, theirs in pairs}
    if len(found) < len(pairs):
        raise ValueError(f"--columns gives one of our names twice: {columns!r}")
    return found


def split_seeded(
    items: Sequence[Any], fraction: float, validation_share: float, seed: int
) -> tuple[list[Any], list[Any]]:
    """(to learn from, held out): a seeded choice of a share of all, in a seeded order."""
    if not 0 < fraction <= 1 or not 0 < validation_share < 1:
        raise ValueError("--fraction must lie in (0, 1] and --validation-share in (0, 1)")
    if len(items) < 2:
        raise ValueError("one record is too few: at least one to learn from and one to hold out")
    shuffled = random.Random(seed).sample(items, max(2, round(fraction * len(items))))
    n_held_out = max(1, round(validation_share * len(shuffled)))
    if n_held_out == len(shuffled):
        raise ValueError(
            f"--validation-share {validation_share:g} of {len(shuffled)} records holds out all of "
            "them, and leaves none to learn from"
        )
    return shuffled[n_held_out:], shuffled[:n_held_out]


def shorten(documents: list[range], tokens: int) -> list[range]:
    """The first part of each document, `tokens` in all at the most."""
    most = max(2, tokens // len(documents))
    return [document[:most] for document in documents]
