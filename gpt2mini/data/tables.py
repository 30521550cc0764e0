"""CSV and tab-separated files -> rows, each a dictionary under the names of the header."""

import csv
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2mini.data.decoding import open_text

logger = logging.getLogger(__name__)

Rows = Iterator[tuple[str, dict[str, Any]]]  # each with its place in the file, for error messages

LARGEST_FIELD = 2**31 - 1  # by default the csv module stops at 131,072 characters
DELIMITERS = ",;\t|"  # of a .csv file: the first of these that its header holds
EXCEL_SEPARATOR = re.compile(r"sep=(.)", re.IGNORECASE)


def read_csv(path: Path) -> Rows:
    """Rows under a header. The delimiter is the one that the header holds, or the first line names
    as Excel does: sep=; Spaces after all delimiters of the header are part of the delimiter."""
    with open_text(path, newline="") as file:
        first = next((line for line in file if line.strip()), "")
    delimiter = delimiter_of(first)
    others = first.split(delimiter)[1:]
    spaced = bool(others) and all(name.startswith(" ") for name in others)
    yield from read_table(path, delimiter, spaced=spaced)


def read_tsv(path: Path) -> Rows:
    """Tab-separated rows under a header, quoted as Excel and pandas do it, or not at all."""
    try:
        quoted = list(read_table(path, "\t"))
    except ValueError:
        quoted = None
    try:
        literal = list(read_table(path, "\t", quotes=False))
    except ValueError:
        literal = None
    if quoted is None and literal is None:
        list(read_table(path, "\t"))  # raises
    # A quote that is part of the text joins lines until the next one, each whole by itself.
    joined = bool(quoted and literal) and len(quoted or []) < len(literal or [])
    if joined:
        message = "%s: quotes are read as part of the text: as Excel's they would join %d lines"
        logger.warning(message, path, 1 + len(literal or []) - len(quoted or []))
    yield from literal if quoted is None or joined else quoted  # type: ignore[misc]


def delimiter_of(first_line: str) -> str:
    if named := EXCEL_SEPARATOR.fullmatch(first_line.strip("\r\n").strip('"')):
        return named[1]
    outside_quotes = re.sub(r'"[^"]*"', "", first_line)
    return next((one for one in DELIMITERS if one in outside_quotes), ",")


def read_table(path: Path, delimiter: str, quotes: bool = True, spaced: bool = False) -> Rows:
    """A list, read at once: the csv module's limit on the length of a field is a global setting."""
    limit_before = csv.field_size_limit(LARGEST_FIELD)
    try:
        with open_text(path, newline="") as file:
            # strict: otherwise an unclosed quote takes the rest of the file
            lines = csv.reader(
                file,
                delimiter=delimiter,
                quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
                skipinitialspace=spaced,
                strict=True,
            )
            try:
                return iter(list(table_rows(lines, path)))
            except csv.Error as error:
                place = f"{path}, line {lines.line_num}"
                raise ValueError(f"{place}: not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(limit_before)


def table_rows(lines: Any, path: Path) -> Rows:
    """lines: a csv.reader. A row of blank fields alone may have any number of them."""
    names: list[str] = next((row for row in lines if any(map(str.strip, row))), [])
    if EXCEL_SEPARATOR.fullmatch("".join(names)) or names[:1] == ["sep="]:
        names = next(lines, [])
    names = [name.strip() for name in names]
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise ValueError(f"{path}: two columns are called {twice[0]!r}")
    line = lines.line_num
    for row in lines:
        place, line = f"{path}, line {line + 1}", lines.line_num
        if row and not any(map(str.strip, row)):
            yield place, dict.fromkeys(names, "")
        elif row and len(row) != len(names):
            raise ValueError(
                f"{place}: expected the {len(names)} of {', '.join(names)}; found {len(row)}"
            )
        elif row:
            yield place, dict(zip(names, row, strict=True))
