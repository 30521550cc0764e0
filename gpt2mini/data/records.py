"""Records: rows with named fields, from a file, a folder, or a dataset of the Hub."""

import json
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gpt2mini.data.json_rows import shorten
from gpt2mini.data.rows import read_rows

__all__ = ["HUB", "EmptyField", "Omissions", "Record", "read_records", "shorten"]

logger = logging.getLogger(__name__)

HUB = "hf:"  # hf:owner/name or hf:owner/name:split


class EmptyField(ValueError):
    """A field is there and empty: the record has nothing to learn, for this reason."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place}: {reason}")
        self.place, self.reason = place, reason


@dataclass(frozen=True)
class Record:
    """One row: its fields, and its place in the source, for error messages."""

    fields: Mapping[str, Any]
    place: str  # "answers.jsonl, line 3"
    chosen: Collection[str] = ()  # names that `columns` assigns
    used: set[str] = field(default_factory=set, compare=False, repr=False)  # fields read so far

    def value(self, *names: str) -> Any:
        """The first of these fields that exists (ignoring case), as it is; None if none does."""
        name = self.find(names)
        if name is None:
            return None
        self.used.add(name)
        return self.fields[name]

    def text(self, *names: str) -> str | None:
        """The same as a text: numbers and objects as JSON.

        None if none of the fields exists, or for null and NaN.
        """
        return as_text(self.value(*names))

    def required_text(self, *names: str) -> str:
        """The same. Raises ValueError for a missing field, EmptyField for an empty one."""
        value = self.text(*names)
        if value is None and self.find(names) is None:
            raise self.lacks(names)
        if value is None or not value.strip():
            raise EmptyField(self.place, f"{self.find(names)!r} is empty")
        return value

    def find(self, names: Sequence[str]) -> str | None:
        """The first of these names as spelled in this record; assigned names come first.

        Raises ValueError if two fields differ in case or white space alone.
        """
        assigned = next((name for name in names if name in self.chosen), None)
        if assigned is not None:
            return assigned
        name = next((name for name in names if name in self.spellings), None)
        if name is None:
            return None
        if len(same := self.spellings[name]) > 1:
            raise ValueError(f"{self.place}: which of {same} is the {name}? Rename one of them")
        return same[0]

    @cached_property
    def spellings(self) -> dict[str, list[str]]:
        """Names in lower case -> as the fields are spelled."""
        found: dict[str, list[str]] = {}
        for name in self.fields:
            found.setdefault(name.strip().lower(), []).append(name)
        return found

    def lacks(self, names: Sequence[str]) -> ValueError:
        wanted = " or ".join(map(repr, names))
        found = ", ".join(name if len(name) < 40 else f"{name[:40]}..." for name in self.fields)
        remedy = f"A column by another name is assigned with --columns {names[0]}=THEIRS"
        if any(map(looks_like_a_value, self.fields)):
            remedy = f"If that is a record and no header, add a first line of names. {remedy}"
        return ValueError(f"{self.place}: expected {wanted}; found {found}. {remedy}")


def looks_like_a_value(name: str) -> bool:
    """Whether a name is a number or a sentence: then the table may have no header, as the CSV files
    of AG News and Yelp reviews have none."""
    return name.strip().isdigit() or len(name.split()) > 4


def as_text(value: Any) -> str | None:
    """A value of JSON or Parquet as a text. None for null and for NaN, which is pandas' null."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def read_records(
    source: str | Path,
    columns: Mapping[str, str] | None = None,
    known: Sequence[str] = (),
) -> Iterator[Record]:
    """The rows of a file of records (`rows.FORMS`), of the training files of a folder, or of
    `hf:owner/name:split`.

    columns: other names of fields in the source, {"prompt": "question"}; they take precedence over
    the usual names. known: the names allowed as keys of `columns`.
    Raises ValueError, with the line number, for a row that cannot be read, and for an empty file.
    """
    columns = columns or {}
    if unknown := [ours for ours in columns if known and ours not in known]:
        raise ValueError(f"{unknown[0]!r} is not a known field: {', '.join(known)}")
    rows = read_hub(str(source)) if str(source).startswith(HUB) else read_rows(Path(source))
    empty = True
    for place, row in rows:
        empty = False
        yield Record(rename(row, columns, place), place, columns.keys())
    if empty:
        raise ValueError(f"{source} has no record")


def rename(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> dict[str, Any]:
    """The fields of a row, those of `columns` by our names for them."""
    for theirs in columns.values():
        if theirs not in row:
            raise ValueError(f"{place}: there is no column {theirs!r}, only {', '.join(row)}")
    renamed = {ours: row[theirs] for ours, theirs in columns.items()}
    others = {name: x for name, x in row.items() if name not in columns.values()}
    return {**{name: x for name, x in others.items() if name not in renamed}, **renamed}


def read_hub(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a dataset of the Hub, downloaded and cached by the `datasets` package."""
    name, _, split = source.removeprefix(HUB).partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f'{source} needs the datasets package: pip install "gpt2mini[datasets]"'
        ) from error
    for number, row in enumerate(load_dataset(name, split=split or "train"), start=1):
        yield f"{source}, record {number}", dict(row)


class Omissions:
    """What a reader leaves out of a source, to be named once with a count."""

    def __init__(self, source: str | Path) -> None:
        self.source = source
        self.records = 0
        self.reasons: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # reason -> the first place
        self.columns: Counter[str] = Counter()  # how many records have a value in each unused one
        self.with_returns = 0  # records in which \r is learned
        self.unanswered = 0  # turns of dialogues

    def see(self, record: Record) -> None:
        """A record that has been read: its other fields are not used."""
        self.records += 1
        for name, value in record.fields.items():
            if name not in record.used and value is not None and value != "":
                self.columns[name] += 1
        self.with_returns += any("\r" in str(record.fields[name]) for name in record.used)

    def drop(self, reason: str, place: str) -> None:
        self.records += 1
        self.reasons[reason] += 1
        self.first.setdefault(reason, place)

    def log(self) -> None:
        """One warning for each reason, and one for all columns that are not used."""
        for reason, count in self.reasons.items():
            message = "%s: %d of %d records left out: %s (first: %s)"
            logger.warning(message, self.source, count, self.records, reason, self.first[reason])
        if self.columns:
            shown = ", ".join(f"{name} ({count})" for name, count in self.columns.items())
            message = "%s: columns that are not used, with the number of records: %s"
            logger.warning(message, self.source, shown)
        if self.unanswered:
            message = "%s: %d turns in dialogues have no answer: nothing is learned of them"
            logger.warning(message, self.source, self.unanswered)
        if self.with_returns:
            message = r"%s: %d of %d records hold carriage returns (\r), learned as they stand"
            logger.warning(message, self.source, self.with_returns, self.records)
