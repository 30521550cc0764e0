"""Files of records, in every form that people have, become the same rows; what was written is what
is read."""

import codecs
import csv
import gzip
import io
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2mini.data.decoding import numbered_lines, open_text, read_text
from gpt2mini.data.records import read_records
from gpt2mini.data.rows import FORMS, REFUSED, split_files

ROWS = [
    {"prompt": "Why — 遠い?", "completion": 'So,\n"then".'},
    {"prompt": "Who;", "completion": "I"},
]
SHORT = [{"prompt": "Why?", "completion": "So."}, {"prompt": "Who?", "completion": "I."}]


def write(path: Path, contents: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [dict(record.fields) for record in read_records(path)]


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    """As the csv module writes it, in Excel's dialect."""
    output = io.StringIO(newline="")
    writer = csv.DictWriter(output, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return output.getvalue()


def lines(rows: list[dict[str, Any]], **options: Any) -> str:
    return "\n".join(json.dumps(row, **options) for row in rows)


COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
INDEXED = {name: {str(i): x for i, x in enumerate(column)} for name, column in COLUMNS.items()}
SPLIT = {"columns": list(COLUMNS), "index": [0, 1], "data": [list(row.values()) for row in ROWS]}
ARRANGED: dict[str, tuple[str, str | bytes]] = {
    "lines": ("a.jsonl", lines(ROWS)),
    "lines, not escaped": ("a.jsonl", lines(ROWS, ensure_ascii=False)),
    "lines called .json": ("a.json", lines(ROWS)),
    "ndjson": ("a.ndjson", lines(ROWS) + "\n\n"),
    "lines that end in commas": ("a.jsonl", lines(ROWS).replace("\n", ",\n") + ","),
    "objects over several lines": ("a.jsonl", lines(ROWS, indent=2)),
    "a list": ("a.json", json.dumps(ROWS)),
    "an indented list": ("a.json", json.dumps(ROWS, indent=1)),
    "a list called .jsonl": ("a.jsonl", json.dumps(ROWS)),
    "a list with a row a line": ("a.jsonl", f"[\n{lines(ROWS)}\n]".replace("}\n{", "},\n{")),
    "a list under a key": ("a.json", json.dumps({"version": "1", "data": ROWS}, indent=2)),
    "a list under a key, in a line": ("a.json", json.dumps({"rows": ROWS})),
    "pandas, by columns": ("a.json", json.dumps(INDEXED)),
    "pandas, by rows": ("a.json", json.dumps({str(i): row for i, row in enumerate(ROWS)})),
    "pandas, split": ("a.json", json.dumps(SPLIT)),
    "pandas, table": ("a.json", json.dumps({"schema": {"fields": []}, "data": ROWS})),
    "lists of values": ("a.json", json.dumps(COLUMNS)),
    "comma": ("a.csv", table(ROWS)),
    "semicolon": ("a.csv", table(ROWS, ";")),
    "semicolon, with a mark": ("a.csv", "\ufeff" + table(ROWS, ";")),
    "sep=; as Excel says it": ("a.csv", "sep=;\r\n" + table(ROWS, ";")),
    "spaces after the commas": (
        "a.csv",
        'prompt, completion\n"Why — 遠い?", "So,\n""then""."\nWho;, I',
    ),
    "tab in .csv": ("a.CSV", table(ROWS, "\t")),
    "bar": ("a.csv", table(ROWS, "|")),
    "tsv": ("a.tsv", table(ROWS, "\t")),
    "tab": ("a.tab", table(ROWS, "\t")),
    "Excel's Unicode Text": ("a.txt", table(ROWS, "\t").encode("utf-16")),
    "UTF-16 without a mark": ("a.csv", table(ROWS).encode("utf-16-le")),
    "UTF-16, big endian": ("a.jsonl", codecs.BOM_UTF16_BE + lines(ROWS).encode("utf-16-be")),
    "a mark": ("a.jsonl", "\ufeff" + lines(ROWS)),
    "carriage returns and line feeds": ("a.jsonl", lines(ROWS).replace("\n", "\r\n")),
    "gzip": ("a.jsonl.gz", gzip.compress(lines(ROWS).encode(), mtime=0)),
    "gzip of CSV": ("a.csv.GZ", gzip.compress(table(ROWS).encode("utf-16"), mtime=0)),
    "gzip without its ending": ("a.json", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
}


@pytest.mark.parametrize("arranged", ARRANGED)
def test_every_form_of_file_gives_the_same_rows(tmp_path: Path, arranged: str) -> None:
    name, contents = ARRANGED[arranged]
    assert rows_of(write(tmp_path / name, contents)) == ROWS


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == ROWS
    whole = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(ValueError, match=r"b\.parquet is not a whole Parquet file"):
        rows_of(write(tmp_path / "b.parquet", whole[: len(whole) // 2]))


def test_without_pyarrow_the_user_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"a\.parquet needs pyarrow: .*gpt2mini\[parquet\]"):
        rows_of(write(tmp_path / "a.parquet", b"PAR1"))


def test_old_line_ends_are_line_ends(tmp_path: Path) -> None:
    for name, text in (("a.csv", table(SHORT)), ("a.jsonl", lines(SHORT) + "\n")):
        path = write(tmp_path / name, text.replace("\r\n", "\n").replace("\n", "\r"))
        assert rows_of(path) == SHORT


texts = st.text() | st.text(st.sampled_from("\0\x01\t\n\r\x1c\x85\u2028\ufeff\"',;|\\x= "))
tables = st.lists(
    st.fixed_dictionaries({"prompt": texts, "completion": texts}), min_size=1, max_size=5
)


@given(rows=tables)
def test_json_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    for ascii_only in (True, False):
        text = lines(rows, ensure_ascii=ascii_only)
        assert rows_of(write(folder / "a.jsonl", text)) == rows
        assert rows_of(write(folder / "a.jsonl", text.encode("utf-16"))) == rows
        text = json.dumps(rows, indent=1, ensure_ascii=ascii_only)
        assert rows_of(write(folder / "a.json", text)) == rows


def blank(row: dict[str, Any]) -> bool:
    return not any(value.strip() for value in row.values())


@given(rows=tables, delimiter=st.sampled_from(",;\t|"))
def test_csv_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], delimiter: str
) -> None:
    """A row of white space alone is read as an empty one. In a .tsv a field of several lines with
    tabs may be several rows with quotes in their text."""
    if sys.version_info < (3, 11):  # there the csv module refuses NUL
        rows = [{name: x.replace("\0", "") for name, x in row.items()} for row in rows]
    expected = [dict.fromkeys(row, "") if blank(row) else row for row in rows]
    folder = tmp_path_factory.getbasetemp()
    fields = [text for row in rows for text in row.values()]
    several = any("\t" in text and ("\n" in text or "\r" in text) for text in fields)
    names = ["a.csv", *(["a.tsv"] if delimiter == "\t" and not several else [])]
    for name in names:
        assert rows_of(write(folder / name, table(rows, delimiter))) == expected


def test_tabs_with_and_without_quotes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    excel = 'label\ttext\nham\t"He said ""hi"" to me"\nspam\t"two\tcolumns"\n'
    assert [row["text"] for row in rows_of(write(tmp_path / "a.tsv", excel))] == [
        'He said "hi" to me',
        "two\tcolumns",
    ]
    for text in ('"It was', 'she said "no"', 'it was"'):
        literal = f'label\ttext\nham\t"Hello\nspam\t{text}\nham\tx\n'
        found = [row["text"] for row in rows_of(write(tmp_path / "b.tsv", literal))]
        assert found == ['"Hello', text, "x"]
    assert "as Excel's they would join 2 lines" in caplog.text


# ---- what cannot be read


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": }\n', "line 2: not valid JSON"),
        ("a.jsonl", '{"a": \n{"a": 1}\n', "line 1: not valid JSON"),
        ("a.json", '\n[\n{"a": 1},\n{"a" 1}\n]', r"line 2: not valid JSON \(.*, in line 4\)"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2: expected an object with named fields, found"),
        ("a.jsonl", '{"a": 1}\n\n{"a": 1, "a": 2}\n', "line 3: .*two keys are called 'a'"),
        ("a.json", '{"train": [{"a": 1}], "test": [{"a": 2}]}', r"several lists .*train, test"),
        ("a.csv", "a,b\n1,2\n3\n", "line 3: expected the 2 of a, b; found 1"),
        ("a.csv", 'a,b\n"1\n1",2\n3,4,5\n', "line 4: expected the 2 of a, b; found 3"),
        ("a.csv", 'a,b\n1,"2\n3,4\n', "not valid CSV"),
        ("a.csv", b"a,b\n1,2\n1,\xa32\n", r"line 3: not UTF-8 text \(byte 0xa3 .*iconv -f latin1"),
        ("a.jsonl", b'{"a": "\xe9"}', "line 1: not UTF-8"),
        ("a.jsonl", b"\xff\xfe{\x00x", "not valid UTF-16: save it as UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-9], "not a whole gzip file"),
        ("a.jsonl", bytes(5000), "most of its bytes are NUL"),
        ("a.csv", b"PK\x03\x04....", "not text but a zip archive, or a document of Excel"),
        ("a.xlsx", b"PK\x03\x04....", r"a\.xlsx: save it as CSV"),
        ("a.zip", b"PK\x03\x04....", r"a\.zip: unpack it first"),
        ("a.txt", "plain", "plain text has no records"),
        ("a.unknown", "x", r"expected a file that ends in \.jsonl, \.ndjson, \.json, \.csv, \.tsv"),
        ("a.jsonl", "\n\n", "has no record"),
        ("a.csv", "a,b\n", "has no record"),
    ],
)
def test_what_is_wrong_is_said_with_the_line(
    tmp_path: Path, name: str, contents: str | bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of(write(tmp_path / name, contents))


@pytest.mark.parametrize("ending", REFUSED)
def test_a_form_that_is_not_read_is_refused_with_what_to_do(tmp_path: Path, ending: str) -> None:
    with pytest.raises(ValueError, match=ending):
        rows_of(write(tmp_path / f"a{ending}", "x"))


# ---- folders


def test_a_folder_gives_its_training_files_and_names_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i, name in enumerate(["train-0.jsonl", "train-1.csv", "val.jsonl", "test/0.jsonl"]):
        rows = [{"prompt": str(i), "completion": "x"}]
        write(tmp_path / name, table(rows) if name.endswith("csv") else lines(rows))
    for name in ("README.md", "._train-0.jsonl", ".git/train.jsonl"):
        write(tmp_path / name, b"\0\5\x16\7")
    assert [row["prompt"] for row in rows_of(tmp_path)] == ["0", "1"]
    assert "2 files left out, by their names not for training: test/0.jsonl, val" in caplog.text
    assert "1 file left out, without records: README.md" in caplog.text
    names = {
        part: [file.relative_to(tmp_path).as_posix() for file in files]
        for part, files in split_files(tmp_path).items()
    }
    assert names == {
        "train": ["train-0.jsonl", "train-1.csv"],
        "validation": ["val.jsonl"],
        "test": ["test/0.jsonl"],
    }


def test_a_folder_without_training_files_is_read_whole(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", lines(SHORT))
    assert rows_of(tmp_path) == SHORT
    with pytest.raises(ValueError, match="holds no records: expected a file that ends"):
        rows_of(write(tmp_path / "empty" / "a.md", "x").parent)


# ---- characters


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode(),
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
        lambda text: text.encode("utf-16-le"),
        lambda text: text.encode("utf-16-be"),
        lambda text: text.encode("utf-32"),
        lambda text: gzip.compress(text.encode("utf-8-sig"), mtime=0),
    ],
)
@pytest.mark.parametrize("text", ["The cat — sat.\nOn.\n", "Привет, как твои дела?\n" * 20])
def test_a_text_is_the_same_in_every_encoding(
    tmp_path: Path, encode: Callable[[str], bytes], text: str
) -> None:
    for ends in ("\n", "\r\n", "\r"):
        path = write(tmp_path / "a.txt", encode(text.replace("\n", ends)))
        assert read_text(path) == text
        assert [number for number, _ in numbered_lines(path)] == list(
            range(1, text.count("\n") + 1)
        )
        with open_text(path, newline="") as file:
            assert file.read() == text.replace("\n", ends)


@given(text=st.text())
def test_only_line_ends_are_changed(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = write(tmp_path_factory.getbasetemp() / "a.txt", text.encode("utf-8-sig"))
    assert read_text(path) == text.replace("\r\n", "\n").replace("\r", "\n")


def test_other_separators_of_unicode_end_no_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\u2028two\x85three\x1c\x0b\x0cfour\nfive\n")
    assert [number for number, _ in numbered_lines(path)] == [1, 2]


def test_every_form_is_tried_here() -> None:
    endings = {Path(name.lower().removesuffix(".gz")).suffix for name, _ in ARRANGED.values()}
    assert endings - {".txt"} == set(FORMS) - {".parquet"}


def test_two_spellings_of_a_column_are_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "Text,text,label\nkept,lost?,a\n")
    (record,) = read_records(path)
    with pytest.raises(ValueError, match=r"line 2: which of \['Text', 'text'\] is the text\?"):
        record.text("text")
    (record,) = read_records(path, {"text": "Text"})
    assert record.text("text") == "kept"


@pytest.mark.parametrize(
    ("value", "text"),
    [(3, "3"), (1.5, "1.5"), (True, "true"), ({"é": [1]}, '{"é": [1]}'), (None, None)],
)
def test_values_that_are_no_text_are_read_as_json(tmp_path: Path, value: Any, text: Any) -> None:
    (record,) = read_records(write(tmp_path / "a.jsonl", lines([{"output": value}])))
    assert record.text("output") == text
    (record,) = read_records(write(tmp_path / "a.jsonl", '{"output": NaN}'))
    assert record.text("output") is None


def test_nothing_is_logged_about_a_plain_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        rows_of(write(tmp_path / "a.jsonl", lines(SHORT)))
    assert not caplog.text
