"""Labeled texts as people have them: what is read, dropped with a count, or refused by name."""

import csv
import gzip
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2mini.classification.class_names import class_name, in_order
from gpt2mini.classification.label_files import part_to_score, read_texts
from gpt2mini.classification.labeled import LabeledTexts, read_labeled


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---- names of classes


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("spam\u200b", "spam"),
        ("\ufeffspam\u00a0", "spam"),
        ("not\u00a0 spam", "not spam"),
        ("\u200fspam\u200e", "spam"),
        ("tre\u0300s bon", "tr\u00e8s bon"),
        (1, "1"),
        (1.0, "1"),
        ("1.0", "1"),
        ("-2.00", "-2"),
        (0.5, "0.5"),
        ("1.5", "1.5"),
        ("01", "01"),  # a code, perhaps: named in a warning
        (True, "true"),
        (False, "false"),
        (["ham"], "ham"),
        ([1.0], "1"),
        ("none", "none"),  # the class of texts that have none of the others
    ],
)
def test_what_looks_the_same_is_one_class(label: Any, expected: str) -> None:
    assert class_name(label) == expected


@pytest.mark.parametrize(
    "label",
    [None, math.nan, "", " ", "\u200b", "nan", "NaN", "NULL", "None", "NA", "N/A", [], [None]],
)
def test_what_is_missing_is_no_class(label: Any) -> None:
    assert class_name(label) is None


@pytest.mark.parametrize("label", [["a", "b"], {"a": 1}])
def test_labels_that_are_several_are_refused(label: Any) -> None:
    with pytest.raises(ValueError, match=r"2 labels|a text or a number"):
        class_name(label)


@given(st.lists(st.integers(-200, 200), unique=True))
def test_numbers_are_in_the_order_of_their_values(numbers: list[int]) -> None:
    assert in_order([*map(str, numbers), "b", "a"]) == [*map(str, sorted(numbers)), "a", "b"]


# ---- tables


def table(rows: list[list[str]], delimiter: str) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter).writerows(rows)
    return file.getvalue()


ROWS = [["ham", 'He said "hi", twice'], ["spam", "two\nlines"], ["ham", "é — 漢字"]]
EXPECTED = LabeledTexts([text for _, text in ROWS], [0, 1, 0], ["ham", "spam"])
OBJECTS = [{"label": label, "text": text} for label, text in ROWS]


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("a.csv", table([["label", "text"], *ROWS], ",")),
        ("a.csv", table([["text", "label"], *(row[::-1] for row in ROWS)], ";")),
        ("a.tsv", table([["label", "text"], *ROWS], "\t")),
        ("a.tsv", table([["sentence", "label"], *(row[::-1] for row in ROWS)], "\t")),
        ("a.tsv", table([["label", "text", "source"], *([*row, "web"] for row in ROWS)], "\t")),
        ("data", table([["id", "Sentiment", "Review"], *(["1", *row] for row in ROWS)], "\t")),
        ("a.txt", table([["label", "text"], *ROWS], "\t").encode("utf-16")),  # of Excel
        ("a.csv.gz", gzip.compress(table([["label", "text"], *ROWS], ",").encode(), mtime=0)),
        ("a.ndjson", "\n".join(map(json.dumps, OBJECTS))),
        ("a.json", json.dumps({"data": OBJECTS})),
    ],
)
def test_tables_with_a_header_are_read_alike(
    tmp_path: Path, name: str, contents: str | bytes
) -> None:
    found = read_labeled(write(tmp_path / name, contents))
    texts = [text.replace("\r\n", "\n") for text in found.texts]
    assert LabeledTexts(texts, found.labels, found.class_names) == EXPECTED


def test_quotes_of_lines_are_those_of_pandas_or_part_of_the_text(tmp_path: Path) -> None:
    quoted = write(tmp_path / "a.tsv", 'ham\t"He said ""hi"" to me"\nspam\tno quote\n')
    assert read_labeled(quoted).texts == ['He said "hi" to me', "no quote"]
    literal = write(tmp_path / "b.tsv", 'ham\t"See you"\nspam\t"WIN" a "prize"\n')
    assert read_labeled(literal).texts == ['"See you"', '"WIN" a "prize"']


REFUSED = {
    "three columns without a header": ("gj04\t1\t*\tA sentence.\n", "4 columns and no header"),
    "text first": (
        "".join(f"film {i}\t{i % 2}\n" for i in range(9)),
        "unless a first line such as",
    ),
    "an unknown header": (
        "v1\tv2\n" + "".join(f"{'ham' if i % 2 else 'spam'}\tmessage {i}\n" for i in range(9)),
        r"is its first line 'v1'<TAB>'v2' a header.*--columns label=v1,text=v2",
    ),
    "half a header": ("label\tcomment\nham\tx\nspam\ty\n", "expected 'text' or.*found label, comm"),
    "no tab": ("ham\tx\nspam y\n", "line 2: expected label<TAB>text, found 'spam y'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_have_to_be_guessed_is_refused(tmp_path: Path, case: str) -> None:
    contents, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        read_labeled(write(tmp_path / "a.tsv", contents))


def test_a_header_of_other_names_is_read_by_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "v1\tv2\tv3\nham\tx\t0\nspam\ty\t1\n")
    found = read_labeled(path, {"label": "v1", "text": "v2"})
    assert found == LabeledTexts(["x", "y"], [0, 1], ["ham", "spam"])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            "id,message,text,label",
            "the text might be in any of the columns message, text: .*columns",
        ),
        ("class,label,text,id", "the label might be in any of the columns class, label: .*columns"),
        ("Text,text,label,id", "the text might be in any of the columns Text, text"),
        (
            "query,answer,a,b",
            "expected 'label' or .*found query, answer, a, b. A column by another",
        ),
        (
            "4,Oil up,Shares fell,b",
            r"found 4, Oil up, Shares fell, b\. If that is a record and no h",
        ),
    ],
)
def test_columns_that_might_be_meant_are_asked_for(
    tmp_path: Path, header: str, message: str
) -> None:
    path = write(tmp_path / "a.csv", f"{header}\n1,x,y,a\n2,x,y,b\n")
    with pytest.raises(ValueError, match=message):
        read_labeled(path)


def test_a_choice_among_columns_is_respected(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,message,text,label\n1,x,title,a\n2,y,title,b\n")
    assert read_labeled(path, {"text": "message"}).texts == ["x", "y"]
    assert read_labeled(path, {"text": "text"}).texts == ["title", "title"]


# ---- lines of fastText, folders


def test_lines_of_fasttext(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "__label__ham see you  at six\n__label__spam WIN\n")
    assert read_labeled(path) == LabeledTexts(["see you  at six", "WIN"], [0, 1], ["ham", "spam"])
    path = write(tmp_path / "a.txt", "__label__ham __label__long see you\n")
    with pytest.raises(ValueError, match=r"line 1: a text has 2 labels, \['ham', 'long'\]"):
        read_labeled(path)


def test_labels_of_fasttext_are_words_of_their_line(tmp_path: Path) -> None:
    """Any white space separates them from the text, on either side of which they may stand."""
    lines = [
        "__label__spam\tWin a  prize",
        "see you at six __label__ham",
        "no__label__ here \t __label__ham  at all",
        "\t__label__ham \t see\tyou ",
    ]
    expected = ["Win a  prize", "see you at six", "no__label__ here \t  at all", "see\tyou"]
    for first in range(len(lines)):
        order = [*range(first, len(lines)), *range(first)]
        path = write(tmp_path / "a.txt", "".join(f"{lines[i]}\n" for i in order))
        assert read_labeled(path) == LabeledTexts(
            [expected[i] for i in order], [int(i == 0) for i in order], ["ham", "spam"]
        )
    path = write(tmp_path / "a.txt", "__label__ham see you\nno label\n")
    with pytest.raises(ValueError, match="line 2: expected the text and its __label__NAME: 'no la"):
        read_labeled(path)


def test_a_folder_of_a_folder_for_each_class(tmp_path: Path) -> None:
    for name in ("neg/1.txt", "neg/2.txt", "pos/1.txt", "pos/._1.txt"):
        write(tmp_path / "all" / name, name)
        for purpose in ("train", "test"):
            write(tmp_path / "split" / purpose / name, f"{purpose} {name}")
    found = read_labeled(tmp_path / "all")
    assert found == LabeledTexts(["neg/1.txt", "neg/2.txt", "pos/1.txt"], [0, 0, 1], ["neg", "pos"])
    for purpose in ("train", "test"):
        assert read_labeled(tmp_path / "split", purpose=purpose).texts == [
            f"{purpose} {text}" for text in found.texts
        ]


def test_the_newsgroups_as_published(tmp_path: Path) -> None:
    """20news-bydate: the folders above the classes say in a word what they are for."""
    for purpose in ("train", "test"):
        for name in ("alt.atheism/1", "sci.space/1"):
            write(tmp_path / f"20news-bydate-{purpose}" / name, f"{purpose} {name}")
    for purpose in ("train", "test"):
        assert read_labeled(tmp_path, None, ["alt.atheism", "sci.space"], purpose).texts == [
            f"{purpose} {name}" for name in ("alt.atheism/1", "sci.space/1")
        ]


def test_of_a_folder_the_part_to_score_is_the_test_part(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        for name in ("neg", "pos"):
            write(tmp_path / part / name / "1.txt", part)
    assert part_to_score(tmp_path) == "test" and part_to_score(tmp_path / "val") == "train"
    table = write(tmp_path / "only" / "test.csv", "label,text\npos,good\nneg,bad\n")
    assert part_to_score(table.parent) == "test" and part_to_score(table) == "train"
    assert len(read_labeled(table.parent, None, ["neg", "pos"], "test")) == 2
    with pytest.raises(ValueError, match="holds nothing for train, by the names of its files"):
        read_labeled(table.parent)
    assert read_texts(table.parent) == ["good", "bad"]


def test_data_beside_files_for_training_is_not_learned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """imdb on the Hub: reviews without a class, whose label is -1."""
    for name in ("train-0.csv", "test-0.csv", "unsupervised-0.csv"):
        labels = (-1, -1) if name[0] == "u" else (0, 1)
        rows = "".join(f"{label},{name} {i}\n" for i, label in enumerate(labels))
        write(tmp_path / name, f"label,text\n{rows}")
    assert read_labeled(tmp_path).counts() == {"0": 1, "1": 1}
    assert "unsupervised-0.csv" in caplog.text


def test_a_file_without_labels_is_nothing_to_measure_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "label,text\n,good\n,bad\n")
    with pytest.raises(ValueError, match="has no labeled text"):
        read_labeled(path, None, ["neg", "pos"])


def test_texts_to_classify(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One for each record, be it empty; and no label is read as part of a text."""
    path = write(tmp_path / "a.csv", "id,text\n1,good\n2,\n3,bad\n")
    assert read_texts(path) == ["good", "", "bad"]
    assert "1 of 3 texts are empty" in caplog.text
    assert read_texts(write(tmp_path / "a.txt", "label\ttext\nneg\tbad film\n")) == ["bad film"]
    assert read_texts(write(tmp_path / "b.txt", "good\tfilm\n\nbad film\n")) == [
        "good\tfilm",
        "bad film",
    ]
    for lines in ("ham\tgo home\nspam\tbuy\n", "__label__ham go home\n"):
        with pytest.raises(ValueError, match="the label would be read as part of the text"):
            read_texts(write(tmp_path / "labeled.txt", lines))


def test_large_numbers_are_different_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "".join(f"123456{i},text {i}\n" for i in range(3))
    assert len(read_labeled(write(tmp_path / "a.csv", f"label,text\n{rows}")).class_names) == 3
    assert not caplog.records


def test_the_movie_reviews_as_published(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """aclImdb: lists of addresses and reviews without a class beside the folders of the classes."""
    for purpose in ("train", "test"):
        for name in ("neg/0_2.txt", "neg/1_1.txt", "pos/0_9.txt"):
            write(tmp_path / purpose / name, f"{purpose} {name}")
        for name in ("urls_neg.txt", "urls_pos.txt", "labeledBow.feat"):
            write(tmp_path / purpose / name, f"{purpose} {name}")
    for name in ("train/unsup/0_0.txt", "train/unsup/1_0.txt", "train/urls_unsup.txt"):
        write(tmp_path / name, name)
    for name in ("README", "imdb.vocab", "imdbEr.txt"):
        write(tmp_path / name, name)
    for purpose in ("train", "test"):
        assert read_labeled(tmp_path, None, ["neg", "pos"], purpose) == LabeledTexts(
            [f"{purpose} neg/0_2.txt", f"{purpose} neg/1_1.txt", f"{purpose} pos/0_9.txt"],
            [0, 0, 1],
            ["neg", "pos"],
        )
    assert read_labeled(tmp_path / "train").counts() == {"neg": 2, "pos": 1}
    messages = [message.partition(": ")[2] for message in caplog.messages]
    assert [message.partition(": ")[0] for message in messages] == [
        "2 files left out, in folders of texts without a class",
        "10 files left out, not labeled texts",
        "2 files left out, in folders of texts without a class",  # of train/ alone
        "4 files left out, not labeled texts",
    ]
    assert messages[0].endswith("train/unsup/0_0.txt, train/unsup/1_0.txt")
    assert messages[1].endswith("README, imdb.vocab, imdbEr.txt, test/labeledBow.feat, ...")


def test_a_folder_with_the_name_of_a_purpose_is_no_class(tmp_path: Path) -> None:
    for name in ("train/1.txt", "test/1.txt"):
        write(tmp_path / name, name)
    with pytest.raises(ValueError, match="neither files of records nor a folder for each class"):
        read_labeled(tmp_path)


def test_files_for_training_and_test_side_by_side(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        write(tmp_path / f"{name}.csv", f"label,text\nham,{name} 1\nspam,{name} 2\n")
    for purpose, name in (("train", "train"), ("validation", "dev"), ("test", "test")):
        assert read_labeled(tmp_path, purpose=purpose).texts == [f"{name} 1", f"{name} 2"]


# ---- what is left out, and what is in doubt


def rows(*labels: Any) -> str:
    return "\n".join(
        json.dumps({"label": label, "text": f"t{i}"}) for i, label in enumerate(labels)
    )


@pytest.mark.parametrize(
    ("contents", "messages"),
    [
        (rows("a", math.nan, "b", None, "nan"), ["3 of 5 texts have no label", "'nan' (2)"]),
        (rows("a", "A", "b"), ["the classes 'A' (1 texts) and 'a' (1 texts) are learned as diff"]),
        (rows("01", "1", "2"), ["the classes '01' (1 texts) and '1' (1 texts)"]),
        (rows("not spam", "not_spam", "spam"), ["'not spam' (1 texts) and 'not_spam' (1 texts)"]),
        (rows("a", "b") + "\n" + rows("b", "b"), ["1 texts have more than one label", "'t0'"]),
        (rows("a", "b") + '\n{"label": "a", "text": " \\u200b"}', ["1 of 3 texts are empty"]),
        (rows("a", "b").replace("{", '{"source": 1, '), ["not used", "source (2)"]),
    ],
)
def test_what_is_left_out_or_in_doubt_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, contents: str, messages: list[str]
) -> None:
    read_labeled(write(tmp_path / "a.jsonl", contents))
    assert len(caplog.records) == 1
    assert all(message in caplog.text for message in messages)


def test_labels_of_a_test_file_are_those_of_training(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows("b", "b"))
    assert read_labeled(path, class_names=["a", "b", "c"]).labels == [1, 1]
    with pytest.raises(ValueError, match=r"the training data lack: 'b' \(2\); they are 'a', 'c'"):
        read_labeled(path, class_names=["a", "c"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rows(["a", "b"], "a"), r"line 1: a text has 2 labels"),
        (lambda: '{"label": "a", "text": {"body": "x"}}', "line 1: the text must be a text"),
    ],
)
def test_what_cannot_be_learned_is_refused_with_the_line(
    tmp_path: Path, make: Callable[[], str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_labeled(write(tmp_path / "a.jsonl", make()))
