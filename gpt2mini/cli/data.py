"""What jobs read: records, and their split into those to learn from and those held out."""

import logging
import operator
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2mini.data.documents import holds_text
from gpt2mini.data.folders import purpose_to_score
from gpt2mini.data.instructions import TEMPLATES
from gpt2mini.data.records import HUB
from gpt2mini.data.rows import is_file_of_records, split_files
from gpt2mini.data.splitting import hold_out_groups

logger = logging.getLogger(__name__)

RECORDS = "records (.jsonl, .json, .csv, .tsv, .parquet, hf:owner/name)"
BEGINNING = 512  # tokens of a document from which its loss is about that of the whole
Read = Callable[[str], list[Any]]
KeyOf = Callable[[Any], Hashable]


def holds_records(data: str, columns: str | None = None) -> bool:
    """Whether it is a file of records, a folder of such, or a dataset of the Hub; records of texts
    alone are text, unless `columns` says what theirs mean."""
    path = Path(data)
    if path.exists():
        return not holds_text(path) or (columns is not None and is_file_of_records(path))
    return data.startswith(HUB) or is_file_of_records(path)


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


# ---- to learn from, and to hold out


def read_split(
    read: Read,
    data: str,
    held_out: str | None,
    prompt_of: KeyOf,
    fraction: float,
    validation_share: float,
    seed: int,
) -> tuple[list[Any], list[Any], str]:
    """(to learn from, held out, where the latter come from).

    Held out are the records of the file `held_out`, or of a folder's files to score; else the
    validation files (or else the test files) in the folder `data`; else a share of the data, whole
    prompts at a time.
    """
    files = files_to_score(held_out) if held_out else held_out_files(data)
    items = seeded_share(read(data), fraction, seed)
    if not files:
        training, found = split_by_prompt(items, validation_share, seed, prompt_of)
        return training, found, f"{validation_share:.0%} of the data"
    found = [item for file in files for item in read(file)]
    warn_of_overlap(items, found, prompt_of)
    return items, found, ", ".join(Path(file).name for file in files)


def files_to_score(source: str) -> list[str]:
    """What `--held-out` names: a file, or the files of a folder that are not for training."""
    parts = split_files(Path(source)) if Path(source).is_dir() else {}
    found = parts[purpose_to_score(parts)] if parts else []
    return [str(file) for file in found] or [source]


def held_out_files(folder: str) -> list[str]:
    """The files of records in a folder that are by their names for validation, or else for tests;
    none if there are none to learn from beside them."""
    if not Path(folder).is_dir():
        return []
    parts = split_files(Path(folder))
    return [str(file) for file in parts["validation"] or parts["test"]] if parts["train"] else []


def seeded_share(items: Sequence[Any], fraction: float, seed: int) -> list[Any]:
    """A seeded choice of a share of all, in a seeded order."""
    if not 0 < fraction <= 1:
        raise ValueError(f"--fraction must lie in (0, 1], not {fraction}")
    return random.Random(seed).sample(items, min(len(items), max(2, round(fraction * len(items)))))


def split_by_prompt(
    items: Sequence[Any], share: float, seed: int, prompt_of: KeyOf
) -> tuple[list[Any], list[Any]]:
    """(to learn from, held out): a seeded choice. All records of a prompt stay together, and all
    turns of a dialogue."""
    if not 0 < share < 1:
        raise ValueError(f"--validation-share must lie in (0, 1), not {share}")
    if len(items) < 2:
        raise ValueError("one record is too few: at least one to learn from and one to hold out")
    if round(share * len(items)) == len(items):
        raise ValueError(
            f"--validation-share {share:g} of {len(items)} records holds out all of them, and "
            "leaves none to learn from"
        )
    # without a prompt each is alone; the turns of a dialogue have its place in common
    places = [("place", getattr(item, "place", i) or i) for i, item in enumerate(items)]
    prompts = [prompt_of(item) or item for item in items]
    keys: list[list[tuple[Hashable, ...]]] = [
        list(zip(prompts, places, strict=True)),
        list(zip(items, places, strict=True)),
        [(place,) for place in places],
        [(item,) for item in items],
    ]
    training, held_out = hold_out_groups(keys, share, seed)
    return [items[i] for i in training], [items[i] for i in held_out]


def warn_of_overlap(training: Sequence[Any], held_out: Sequence[Any], prompt_of: KeyOf) -> None:
    """Say how many of the records held out are among those learned, whole or in their prompts."""
    for what, key in (("records", lambda item: item), ("prompts", prompt_of)):
        seen = {key(item) for item in training}
        if overlap := sum(key(item) in seen for item in held_out if key(item)):
            message = "%d of %d %s held out are learned from too: their loss says less"
            logger.warning(message, overlap, len(held_out), what)
            return


def shorten(documents: list[range], tokens: int) -> list[range]:
    """The first part of each document, `tokens` in all at the most; of documents so many that
    little more than their first words would be left, a seeded choice."""
    most, left = max(tokens // len(documents), BEGINNING), tokens
    chosen: list[tuple[int, range]] = []
    for number in random.Random(0).sample(range(len(documents)), len(documents)):
        if left < 2 and chosen:  # the first token is not predicted
            break
        part = documents[number][: max(2, min(most, left))]
        chosen.append((number, part))
        left -= len(part)
    return [part for _, part in sorted(chosen, key=operator.itemgetter(0))]
