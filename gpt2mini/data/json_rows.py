"""JSON -> rows, however the records are arranged in the file."""

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from gpt2mini.data.decoding import open_text

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]  # each with its place in the file, for error messages

JSON_SPACE = " \t\r\n"  # RFC 8259; str.strip() would take more
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
BETWEEN = re.compile(r"[ \t\r\n,]*")  # values of a file


def read_json(path: Path) -> Rows:
    """JSON in any arrangement: an object a line, objects over several lines, a list of them, a list
    under a key, or a table by columns as pandas and `datasets` write it."""
    values = json_values(path)
    first, second = next(values, None), next(values, None)
    if first and second:
        for place, value in chain([first, second], values):
            yield place, as_object(value, place)
    elif first:
        found = unwrap(first[1], path)
        if not isinstance(found, list):
            yield first[0], as_object(found, first[0])
            return
        for number, row in enumerate(found, start=1):
            place = f"{path}, record {number}"
            yield place, as_object(row, place)


def json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) for the JSON values one after another in a file.

    If the first line is a whole object, each line has to be one, and the file is read line by line.
    """
    with open_text(path) as file:
        number, line = 1, file.readline()
        while line and not line.strip():
            number, line = number + 1, file.readline()
        if is_object(line):
            yield from json_lines(chain([line], file), number, path)
        else:
            yield from json_stream(line + file.read(), number, path)


def is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(strip_line(line)), dict)
    except (ValueError, RecursionError):
        return False


def strip_line(line: str) -> str:
    """Without the comma that lines cut out of a JSON list end in."""
    return line.strip(JSON_SPACE).removesuffix(",")


def json_lines(lines: Iterator[str], number: int, path: Path) -> Iterator[tuple[str, Any]]:
    for i, line in enumerate(lines, start=number):
        if line.strip(JSON_SPACE):
            place = f"{path}, line {i}"
            try:
                yield place, encodable(JSON.decode(strip_line(line)), line)
            except (ValueError, RecursionError) as error:  # RecursionError: nesting too deep
                raise ValueError(f"{place}: not valid JSON ({error})") from None


def json_stream(text: str, line: int, path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a text, with commas or white space between them; it begins in line `line`."""
    end = 0
    while (start := BETWEEN.match(text, end).end()) < len(text):  # type: ignore[union-attr]
        line += text.count("\n", end, start)
        try:
            value, end = JSON.raw_decode(text, start)
        except (ValueError, RecursionError) as error:  # RecursionError: nesting too deep
            wrong = line + text.count("\n", start, getattr(error, "pos", start))
            what = f"{getattr(error, 'msg', error)}, in line {wrong}"
            raise ValueError(f"{path}, line {line}: not valid JSON ({what})") from None
        yield f"{path}, line {line}", encodable(value, text[start:end])
        line += text.count("\n", start, end)


def encodable(value: Any, source: str) -> Any:
    """The value with U+FFFD for each half of a surrogate pair, which a text cut within an emoji
    ends in ("\\ud83d"), and which no encoding can write. source: the JSON it was read from."""
    if SURROGATE.search(source) is None:
        return value
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [encodable(one, source) for one in value]
    if isinstance(value, dict):
        return {encodable(name, source): encodable(one, source) for name, one in value.items()}
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    """A JSON object. Python would take the last of two equal keys, and lose the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"two keys are called {next(n for n in names if names.count(n) > 1)!r}")
    return found


JSON = json.JSONDecoder(object_pairs_hook=unique_keys)


def unwrap(value: Any, path: Path) -> Any:
    """The rows in the only JSON value of a file: a list, or the value itself if it is one row."""
    if not isinstance(value, dict) or not value:
        return value
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        return [dict(zip(value["columns"], row, strict=False)) for row in value["data"]]
    fields = list(value.values())
    if all(isinstance(one, dict) for one in fields) and len({tuple(one) for one in fields}) == 1:
        if all(name.isdigit() for name in value):  # by row, pandas' orient="index"
            return fields
        if all(number.isdigit() for number in fields[0]):  # by column
            return [{name: value[name][i] for name in value} for i in fields[0]]
    if all(map(is_column, fields)) and len({len(column) for column in fields}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*fields, strict=True)]
    lists = [key for key, found in value.items() if is_list_of_rows(found)]
    if len(lists) > 1:
        raise ValueError(
            f"{path} holds several lists of records ({', '.join(lists)}): make a file of each"
        )
    return value[lists[0]] if lists else value


def is_column(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(one, dict | list) for one in value)


def is_list_of_rows(value: Any) -> bool:
    """A list of objects, but not the messages of a dialogue, which are part of a single record."""
    if not isinstance(value, list) or not value or not all(isinstance(x, dict) for x in value):
        return False
    return not any({"role", "content"} <= x.keys() or {"from", "value"} <= x.keys() for x in value)


def as_object(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object with named fields, found {shorten(row)}")
    return row


def shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
