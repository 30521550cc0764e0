"""Records: rows with named fields, from JSONL, JSON, CSV, or a dataset of the Hub."""

import csv
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUB = "hf:"  # hf:owner/name or hf:owner/name:split
LARGEST_FIELD = (
    2**31 - 1
)  # of a CSV file; the default limit of the csv module is 131,072 characters


@dataclass(frozen=True)
class Record:
    """One row: its fields, and its place in the source, for error messages."""

    fields: Mapping[str, Any]
    place: str  # "answers.jsonl, line 3"
    chosen: Collection[str] = ()  # names that `columns` assigns

    def text(self, *names: str) -> str | None:
        """The text of the first of these fields that exists (ignoring case).

        None if none of them exists, or for null. Raises ValueError for a field that is not a text.
        """
        name = self.find(names)
        if name is None or self.fields[name] is None:
            return None
        value = self.fields[name]
        if not isinstance(value, str):
            raise ValueError(f"{self.place}: {name!r} must be a text, not {shorten(value)}")
        return value

    def required_text(self, *names: str) -> str:
        """The same; raises ValueError for a missing or empty field."""
        value = self.text(*names)
        if value is None and self.find(names) is None:
            raise self.lacks(names)
        if value is None or not value.strip():
            raise ValueError(f"{self.place}: {self.find(names)!r} is empty")
        return value

    def find(self, names: Sequence[str]) -> str | None:
        """The first of these names as spelled in this record; assigned names come first."""
        by_lower = {name.strip().lower(): name for name in self.fields}
        names = [name for name in names if name in self.chosen] or names
        return next((by_lower[name] for name in names if name in by_lower), None)

    def lacks(self, names: Sequence[str]) -> ValueError:
        wanted = " or ".join(map(repr, names))
        return ValueError(f"{self.place}: expected {wanted}; found {', '.join(self.fields)}")


def read_records(
    source: str | Path,
    columns: Mapping[str, str] | None = None,
    known: Sequence[str] = (),
) -> Iterator[Record]:
    """The rows of a .jsonl, .json (an array of objects) or .csv file, or of `hf:owner/name:split`.

    columns: other names of fields in the source, {"prompt": "question"}; they take precedence over
    the usual names. known: the names allowed as keys of `columns`.
    Raises ValueError, with the line number, for a row that cannot be read, and for an empty file.
    """
    columns = columns or {}
    if unknown := [ours for ours in columns if known and ours not in known]:
        raise ValueError(f"{unknown[0]!r} is not a known field: {', '.join(known)}")
    rows = read_hub(str(source)) if str(source).startswith(HUB) else read_file(Path(source))
    empty = True
    for place, row in rows:
        empty = False
        for theirs in columns.values():
            if theirs not in row:
                raise ValueError(f"{place}: there is no column {theirs!r}, only {', '.join(row)}")
        renamed = {ours: row[theirs] for ours, theirs in columns.items()}
        others = {name: x for name, x in row.items() if name.strip().lower() not in renamed}
        yield Record({**others, **renamed}, place, columns.keys())
    if empty:
        raise ValueError(f"{source} has no record")


def read_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    suffix = path.suffix.lower()
    if suffix == ".csv":
        yield from read_csv(path)
    elif suffix == ".json" and path.read_bytes().lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"[":
        yield from read_json_array(path)
    elif suffix in (".json", ".jsonl"):
        yield from read_json_lines(path)
    else:
        raise ValueError(f"{path}: expected a file that ends in .jsonl, .json or .csv")


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) for each line that is not empty."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: not UTF-8 text ({error})") from None
        if text.strip():
            yield number, text


def read_csv(path: Path) -> list[tuple[str, dict[str, Any]]]:
    for _ in numbered_lines(path):  # names a line that is not UTF-8
        pass
    found = []
    limit_before = csv.field_size_limit(
        LARGEST_FIELD
    )  # a global setting: hence a list, read at once
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(
                file, strict=True
            )  # otherwise an unclosed quote takes the rest of the file
            names = list(rows.fieldnames or [])
            if twice := [name for name in names if name.strip() and names.count(name) > 1]:
                raise ValueError(f"{path}: two columns are called {twice[0]!r}")
            for row in rows:
                place = f"{path}, line {rows.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{place}: expected the {len(names)} of {', '.join(names)}")
                found.append((place, row))
    except csv.Error as error:
        line = rows.reader.line_num
        raise ValueError(f"{path}, line {line}: not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(limit_before)
    return found


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in numbered_lines(path):
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # RecursionError: nesting too deep
            raise ValueError(f"{place}: not valid JSON ({error})") from None
        yield place, as_object(row, place)


def read_json_array(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    for number, row in enumerate(rows, start=1):
        place = f"{path}, record {number}"
        yield place, as_object(row, place)


def as_object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object with named fields, found {shorten(row)}")
    return row


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


def shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
