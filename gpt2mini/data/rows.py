"""Files of records -> rows with named fields: one function for each form of file.

`FORMS` is the table of what is read, by the ending of the name (`.gz` after it is nothing special):
to read another form, add a function and a line. `REFUSED` says what to do with other files.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpt2mini.data.decoding import open_text
from gpt2mini.data.folders import by_purpose, form_of, log_left_out, visible_files
from gpt2mini.data.json_rows import read_json
from gpt2mini.data.tables import read_csv, read_tsv

Rows = Iterator[tuple[str, dict[str, Any]]]  # each with its place in the file, for error messages


def read_parquet(path: Path) -> Rows:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f'{path} needs pyarrow: pip install "gpt2mini[parquet]"') from error
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, record {number}", row
    except ArrowException as error:
        raise ValueError(f"{path} is not a whole Parquet file: {error}") from None


FORMS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".tab": read_tsv,
    ".parquet": read_parquet,
}
ENDINGS = f"expected a file that ends in {', '.join(FORMS)}, or one of these and .gz"
REFUSED = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods", ".numbers"), "save it as CSV"),
    **dict.fromkeys((".arrow", ".feather"), "write it with to_parquet or to_json"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth"), "a pickle may run code; write JSON lines"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z"), "unpack it first"),
    **dict.fromkeys((".bz2", ".xz", ".zst"), "decompress it first, or compress with gzip"),
    **dict.fromkeys((".yaml", ".yml", ".xml", ".db", ".sqlite"), "write its records as JSON lines"),
    ".txt": "plain text has no records; a table needs a header with tabs",
}


def is_file_of_records(path: Path) -> bool:
    return form_of(path) in FORMS


def read_rows(path: Path) -> Rows:
    """(place, row) for each record of a file, or of the training files of a folder.

    Raises FileNotFoundError; ValueError, with the line, for a row that cannot be read, and for a
    form of file that is not read.
    """
    if path.is_dir():
        for file in training_files(path):
            yield from read_rows(file)
    elif not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    elif is_file_of_records(path):
        yield from FORMS[form_of(path)](path)
    elif form_of(path) == ".txt" and "\t" in first_line(path):  # Excel's "Unicode Text"
        yield from read_tsv(path)
    else:
        remedy = REFUSED.get(form_of(path))
        raise ValueError(f"{path}: {f'{remedy}; ' if remedy else ''}{ENDINGS}")


def first_line(path: Path) -> str:
    with open_text(path) as file:
        return file.readline()


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of records in and below a folder: {"train": [...], "validation": [...],
    "test": [...]}, by their names (`folders.by_purpose`)."""
    files = [file for file in visible_files(folder) if is_file_of_records(file)]
    return by_purpose(files, folder)


def training_files(folder: Path) -> list[Path]:
    """The files of records to learn from; a warning names the others. A folder without training
    files is read whole. Raises ValueError for one without files of records."""
    files = visible_files(folder)
    records = [file for file in files if is_file_of_records(file)]
    chosen = split_files(folder)["train"] or records
    if not chosen:
        raise ValueError(f"{folder} holds no records: {ENDINGS}")
    held_out = [file for file in records if file not in chosen]
    log_left_out(folder, held_out, "by their names not for training")
    log_left_out(folder, [file for file in files if file not in records], "without records")
    return chosen
