"""Files of labeled texts -> (label, text) pairs: records, lines, fastText's lines, folders.

Nothing is guessed: a table has a header with known names (or those of `columns`), or it has just
the two columns label and text. Any other is refused, with what to do.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt2mini.data.decoding import numbered_lines, read_text
from gpt2mini.data.folders import (
    PURPOSES,
    form_of,
    grouped,
    log_left_out,
    purpose_of,
    purpose_to_score,
    visible_files,
)
from gpt2mini.data.records import HUB, Omissions, Record, as_text, read_records, rename
from gpt2mini.data.rows import FORMS, REFUSED, is_file_of_records, split_files
from gpt2mini.data.tables import read_tsv

logger = logging.getLogger(__name__)

LABEL_NAMES = ("label", "class", "category", "sentiment", "target")  # of a column or a JSON key
TEXT_NAMES = ("text", "sentence", "message", "review", "content")
FASTTEXT = re.compile(r"(?<!\S)__label__(\S*)\s?")  # a word, and the white space after it
QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')  # and a doubled quote inside
TEXT_FILES = (".txt", ".text", ".md", "")
UNLABELED = ("unsup", "unsupervised", "unlabeled", "unlabelled")  # folders of texts without a class
NOT_CLASSES = {*UNLABELED, *(name for usual in PURPOSES.values() for name in usual)}


class Labeled(NamedTuple):
    """A text with its label as it stands in a file."""

    label: Any
    text: str
    place: str  # "messages.tsv, line 3"


Found = Iterator[Labeled]


def read_pairs(
    source: str | Path, columns: Mapping[str, str] | None = None, purpose: str = "train"
) -> Found:
    """The labeled texts of a file, of a folder (its part for one purpose), or of hf:owner/name."""
    path, known = Path(source), (*LABEL_NAMES, *TEXT_NAMES)
    is_table = is_file_of_records(path) and FORMS[form_of(path)] is not read_tsv
    if str(source).startswith(HUB) or (is_table and not path.is_dir()):
        yield from read_fields(read_records(source, columns, known), source)
    elif path.is_dir():
        parts = parts_of(path)
        if purpose == "train":  # once for all the parts of a folder
            warn_of_unread(path, parts)
        if not parts[purpose]:
            raise ValueError(f"{path} holds nothing for {purpose}, by the names of its files")
        for part in parts[purpose]:
            yield from read_class(part) if part.is_dir() else read_pairs(part, columns)
    elif not path.is_file():
        raise FileNotFoundError(f"{path} is no file of labeled texts")
    elif form_of(path) != ".txt" and (remedy := REFUSED.get(form_of(path))):
        raise ValueError(f"{path} holds no labeled texts that can be read: {remedy}")
    else:
        yield from read_lines(path, columns or {})


def parts_of(source: str | Path) -> dict[str, list[Path]]:
    """What a folder holds for "train", "validation" and "test": files of records, or the folders of
    the classes, by their names (`folders.by_purpose`). Of a file: nothing."""
    folder = Path(source)
    if not folder.is_dir():
        return {purpose: [] for purpose in PURPOSES}
    parts = split_files(folder)
    if not any(parts.values()):
        parts = split_class_folders(folder)
    if not any(parts.values()):
        raise ValueError(f"{folder} holds neither files of records nor a folder for each class")
    return parts


def part_to_score(source: str | Path) -> str:
    """Which part of labeled texts is to be measured on: "test" or else "validation", if there is
    one."""
    return purpose_to_score(parts_of(source), first="test")


def read_texts(source: str | Path, columns: Mapping[str, str] | None = None) -> list[str]:
    """Texts without labels: of records (of a folder, those to test with), one of each, be it empty;
    or of lines that each hold one. Raises ValueError for lines with labels."""
    path = Path(source)
    if path.is_dir() and any((parts := split_files(path)).values()):
        files = parts[purpose_to_score(parts, first="test")]
        return [text for file in files for text in read_texts(file, columns)]
    if str(source).startswith(HUB) or is_file_of_records(path) or path.is_dir():
        return texts_of(read_records(source, columns, (*LABEL_NAMES, *TEXT_NAMES)), source)
    lines = [line for _, line in numbered_lines(path)]
    if lines and is_header(lines[0].split("\t"), columns or {}):
        return texts_of(read_lines_with_header(path, columns or {}), source)
    if columns:
        raise ValueError(f"{path} is read as a text on each line, without columns")
    has_labels = all(line.count("\t") == 1 for line in lines) or any(map(FASTTEXT.search, lines))
    if lines and has_labels:
        raise ValueError(
            f"{path} seems to hold label<TAB>text or __label__NAME text, and the label would be "
            "read as part of the text: measure with --evaluate, or keep the texts alone"
        )
    return lines


def texts_of(records: Iterator[Record], source: str | Path) -> list[str]:
    texts = [as_text(only_value(record, TEXT_NAMES)) or "" for record in records]
    if empty := sum(not text.strip() for text in texts):
        message = "%s: %d of %d texts are empty: the classes predicted for them say nothing"
        logger.warning(message, source, empty, len(texts))
    return texts


# ---- records


def read_fields(records: Iterator[Record], source: str | Path) -> Found:
    """Columns that are not used are named in a warning."""
    unused = Omissions(source)
    for record in records:
        label, text = only_value(record, LABEL_NAMES), only_value(record, TEXT_NAMES)
        if isinstance(text, dict | list):
            raise ValueError(f"{record.place}: the text must be a text, not {str(text)[:60]}")
        unused.see(record)
        yield Labeled(label, as_text(text) or "", record.place)
    unused.log()


def only_value(record: Record, names: Sequence[str]) -> Any:
    """The one field by one of these names, or the one that `columns` assigns. Raises ValueError if
    there is none, or if it might be one of several."""
    if assigned := [name for name in names if name in record.chosen]:
        return record.value(assigned[0])
    found = [field for field in record.fields if field.strip().lower() in names]
    if not found:
        raise record.lacks(names)
    if len(found) > 1:
        ours = names[0]
        raise ValueError(
            f"{record.place}: the {ours} might be in any of the columns {', '.join(found)}: say "
            f"which, with --columns {ours}={found[0]}"
        )
    return record.value(found[0].strip().lower())


# ---- lines


def read_lines(path: Path, columns: Mapping[str, str]) -> Found:
    """Tab-separated lines: records under a header, or label<TAB>text; or fastText's lines."""
    _, first = next(numbered_lines(path), (1, ""))
    cells = [cell.strip().strip('"') for cell in first.split("\t")]
    if FASTTEXT.search(first):
        yield from read_fasttext(path)
    elif is_header(cells, columns):
        yield from read_fields(read_lines_with_header(path, columns), path)
    elif columns:
        raise ValueError(
            f"{path}: its first line has no column {next(iter(columns.values()))!r}, only "
            f"{', '.join(cell[:30] for cell in cells)}"
        )
    else:
        found = without_quotes(list(read_two_columns(path)))
        check_columns(found, path)
        yield from found


def read_lines_with_header(path: Path, columns: Mapping[str, str]) -> Iterator[Record]:
    """The lines as records, whatever the name of the file ends in."""
    for place, row in read_tsv(path):
        yield Record(rename(row, columns, place), place, columns)


def is_header(cells: list[str], columns: Mapping[str, str]) -> bool:
    known = {*LABEL_NAMES, *TEXT_NAMES}
    return len(cells) > 1 and any(
        cell.lower() in known or cell in columns.values() for cell in cells
    )


def read_two_columns(path: Path) -> Found:
    """label<TAB>text, as in the SMS Spam Collection: without a header."""
    for number, line in numbered_lines(path):
        label, *texts = line.split("\t")
        if len(texts) > 1:
            raise ValueError(
                f"{path}, line {number}: {len(texts) + 1} columns and no header that names them: "
                "give the file a first line with a name for each column, as in "
                "source<TAB>label<TAB>note<TAB>text (or say which is which in the header it has, "
                "with --columns label=THEIRS,text=THEIRS), or keep label<TAB>text alone"
            )
        if not texts:
            raise ValueError(f"{path}, line {number}: expected label<TAB>text, found {line[:60]!r}")
        yield Labeled(label, texts[0], f"{path}, line {number}")


def without_quotes(found: list[Labeled]) -> list[Labeled]:
    """The texts without the quotes of Excel and pandas, if the file has them: they double each
    quote of a text and enclose it, so all quotes of the file are of that form. Other quotes are
    part of the text."""
    with_quotes = [one.text for one in found if '"' in one.text]
    if not with_quotes or not all(map(QUOTED.fullmatch, with_quotes)):
        return found
    return [
        one._replace(text=one.text[1:-1].replace('""', '"')) if '"' in one.text else one
        for one in found
    ]


def check_columns(found: Sequence[Labeled], path: Path) -> None:
    """Raise ValueError if the text seems to come first, or the first line to be a header."""
    labels = Counter(one.label.strip() for one in found)
    texts = {one.text.strip() for one in found}
    if len(texts) < len(labels):
        raise ValueError(
            f"{path} has more different labels ({len(labels)}) than texts ({len(texts)}), first "
            f"{found[0].label[:40]!r}: lines must be label<TAB>text, unless a first line such as "
            "text<TAB>label names the columns"
        )
    first = found[0].label.strip() if found else ""
    others = [count for label, count in labels.items() if label != first]
    if labels[first] == 1 and len(others) > 1 and min(others) > 1:
        raise ValueError(
            f"{path}: is its first line {first!r}<TAB>{found[0].text[:40]!r} a header? That label "
            "stands nowhere else. Call the columns label<TAB>text, or pass --columns "
            f"label={first},text={found[0].text.strip()[:40]}; if it is no header, add the header"
        )


def read_fasttext(path: Path) -> Found:
    """__label__ham see you at six. As in fastText any white space separates words, and every word
    that begins with __label__ is a label, wherever it stands; the text is the rest of the line."""
    for number, line in numbered_lines(path):
        place = f"{path}, line {number}"
        labels = FASTTEXT.findall(line)
        if not labels:
            raise ValueError(f"{place}: expected the text and its __label__NAME: {line[:60]!r}")
        yield Labeled(labels, FASTTEXT.sub("", line).strip(), place)


# ---- folders


def split_class_folders(folder: Path) -> dict[str, list[Path]]:
    """The folders that hold the texts of one class each (pos/ and neg/, every text a file), by the
    folders above them: train/pos is for training, test/pos and 20news-bydate-test/sci.space for
    testing. A folder that is itself called so (train/), or unsup/ or unlabeled/, is no class."""
    files = [file for file in visible_files(folder) if form_of(file) in TEXT_FILES]
    classes = sorted({file.parent for file in files} - {folder})
    return grouped(
        {
            one: purpose_of(one.relative_to(folder).parent)
            for one in classes
            if one.name.lower() not in NOT_CLASSES
        }
    )


def warn_of_unread(folder: Path, parts: Mapping[str, Sequence[Path]]) -> None:
    """Name the files of a folder that are in none of its parts."""
    read = {path for paths in parts.values() for path in paths}
    unread = [
        file
        for file in visible_files(folder)
        if file not in read and not (file.parent in read and form_of(file) in TEXT_FILES)
    ]
    unlabeled = {file for file in unread if file.parent.name.lower() in UNLABELED}
    log_left_out(folder, sorted(unlabeled), "in folders of texts without a class")
    others = [file for file in unread if file not in unlabeled]
    log_left_out(folder, others, "not labeled texts")


def read_class(folder: Path) -> Found:
    """Every file is a text, its class the name of the folder."""
    for file in visible_files(folder):
        if file.parent == folder and form_of(file) in TEXT_FILES:
            yield Labeled(folder.name, read_text(file), str(file))
