"""Text into batches: no token lost, moved, or seen twice, however the text is cut on the way."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_ids
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2mini import Tokenizer
from gpt2mini.data import corpus as corpus_module
from gpt2mini.data import documents as documents_module
from gpt2mini.data import overlap
from gpt2mini.data.corpus import (
    TokenFile,
    hold_out,
    read_pieces,
    text_files,
    tokenize_files,
    tokenize_group,
)
from gpt2mini.data.documents import cut, holds_text
from gpt2mini.data.overlap import count_copied_blocks
from gpt2mini.data.text import TokenBatches, pad_batch, sequential_batches, sliding_windows
from gpt2mini.losses import IGNORED
from gpt2mini.tokenizer import END_OF_TEXT, train_tokenizer

WORDS = ["a", "the", "sea's", "42", "中文", "e\u0301", "!?", "<|", "|>", "<|endof"]
SPACES = [" ", "  ", "\n", "\n\n", "\r\n", " \n  ", "\t\n ", " \t ", " \u3000", "\u00a0 "]
LONG = ["x" * 20, "-" * 13, "\t\t\t\t\t", "\u3000" * 9, "\x1c"]  # nowhere, or nowhere good, to cut

# Words of at most 7 characters with a space or newline after each: in half a piece is one of these.
spaced_texts = st.lists(
    st.tuples(
        st.sampled_from(WORDS), st.sampled_from([*SPACES, END_OF_TEXT + "\n", END_OF_TEXT + " "])
    ),
    min_size=8,
    max_size=40,
).map(lambda pairs: "".join(itertools.chain(*pairs)))
any_texts = st.lists(st.sampled_from([*WORDS, *SPACES, *LONG, END_OF_TEXT]), max_size=40).map(
    "".join
)
seeds = st.integers(0, 1000)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """With merges that span the fragments above, so that a cut in a wrong place changes the ids."""
    spaced = [word + space for word in WORDS for space in [*SPACES, *LONG]]
    return train_tokenizer(["".join(spaced), *spaced * 2, "!?\x1c !?\x1c " * 9], vocab_size=500)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_bytes(b"one two\r\nthree<|endoftext|>four five\n")
    return path


def written(folder: Path, text: str, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def documents_of(text: str) -> list[str]:
    text = text.replace("\r\n", "\n")
    return [document for document in text.split(END_OF_TEXT) if document]


def read_documents(path: Path, piece_characters: int, read_characters: int) -> list[list[str]]:
    """The pieces of each document, with the library's sizes replaced by small ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "PIECE_CHARACTERS", piece_characters)
        patch.setattr(documents_module, "READ_CHARACTERS", read_characters)
        documents: list[list[str]] = [[]]
        for piece, ends_document in read_pieces(path):
            documents[-1].append(piece)
            if ends_document:
                documents.append([])
    assert documents.pop() == []  # the file's end is a document's end
    return documents


def take(batches: Any, count: int) -> list[Tensor]:
    """Of `TokenBatches` through as many epochs as it takes."""
    endless = batches.part() if hasattr(batches, "part") else batches
    return [batch.token_ids for batch in itertools.islice(endless, count)]


# From files to pieces


@given(text=any_texts, piece_characters=st.integers(2, 12), read_characters=st.integers(1, 40))
def test_pieces_join_to_the_documents_of_the_file(
    scratch: Path, text: str, piece_characters: int, read_characters: int
) -> None:
    documents = read_documents(written(scratch, text), piece_characters, read_characters)
    assert ["".join(pieces) for pieces in documents] == documents_of(text)


@pytest.mark.parametrize("read_characters", range(20, 60))
def test_a_mark_split_across_reads_of_a_text_without_spaces_is_found(
    scratch: Path, read_characters: int
) -> None:
    path = written(scratch, "x" * 40 + END_OF_TEXT + "y" * 40)
    documents = read_documents(path, piece_characters=16, read_characters=read_characters)
    assert ["".join(pieces) for pieces in documents] == ["x" * 40, "y" * 40]


@settings(max_examples=60)
@given(text=spaced_texts, read_characters=st.integers(1, 60))
def test_ids_of_the_pieces_are_those_of_the_whole_document(
    scratch: Path, tokenizer: Tokenizer, text: str, read_characters: int
) -> None:
    documents = read_documents(written(scratch, text), 24, read_characters)
    for pieces, document in zip(documents, documents_of(text), strict=True):
        ids = [i for piece in pieces for i in tokenizer.encode(piece)]
        assert ids == tokenizer.encode(document)


def test_a_control_character_that_python_takes_for_white_space_does_not_change_the_ids(
    scratch: Path, tokenizer: Tokenizer
) -> None:
    text = "!?\x1c " * 20  # U+001C: str.isspace() says yes, the word pattern no
    (pieces,) = read_documents(written(scratch, text), 16, 100)
    assert len(pieces) > 1
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


@pytest.mark.parametrize("run", [" ", "\n", "\t", "\u3000", "x"])
def test_a_long_run_is_cut_into_few_pieces(monkeypatch: pytest.MonkeyPatch, run: str) -> None:
    monkeypatch.setattr(documents_module, "PIECE_CHARACTERS", 20)
    pieces = cut(run * 1000)
    assert len(pieces) <= 4 * 1000 / 20  # on average, a piece has a quarter of what it may have
    assert "".join(pieces) == run * 1000


def test_a_text_of_ordinary_size_is_one_piece(text_file: Path) -> None:
    assert list(read_pieces(text_file)) == [("one two\nthree", True), ("four five\n", True)]


def test_text_that_is_not_utf8_is_refused_by_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin1\.txt, line 1: not UTF-8 text .*iconv"):
        tokenize_files([tmp_path / "latin1.txt"], tokenizer, tmp_path, progress=False)
    assert not list(tmp_path.glob("*/tokens*"))


def test_a_folder_gives_its_text_files_in_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "below").mkdir()
    names = ["b.txt", "a.TXT", "below/c.txt", "notes.md", "old.txt.gz", "a.pdf", "b.jsonl"]
    paths = {name: written(tmp_path, "x", name) for name in [*names, "._a.txt", ".git"]}
    assert text_files(tmp_path) == [
        paths[name] for name in ("a.TXT", "b.txt", "below/c.txt", "notes.md", "old.txt.gz")
    ]
    assert "2 files left out, by their names: a.pdf, b.jsonl" in caplog.text


def test_a_file_is_taken_whatever_its_name(tmp_path: Path) -> None:
    assert text_files(written(tmp_path, "x", "notes.md")) == [tmp_path / "notes.md"]


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a text file nor a folder"):
        text_files(tmp_path / "nowhere")


def test_a_folder_without_text_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no file that ends in \.txt, "):
        text_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("a.txt", "\ufeffIt was dark.\r\nHe went on.\r\n".encode()),
        ("a.txt", "It was dark.\rHe went on.\r".encode("utf-16")),
        ("a.md", "It was dark.\nHe went on.\n".encode("utf-16-le")),
        ("a.txt.gz", gzip.compress(b"It was dark.\r\nHe went on.\r\n", mtime=0)),
        ("a.jsonl", b'{"text": "It was dark.\\nHe went on.\\n", "id": 3}\n{"text": ""}'),
        ("a.json", b'[{"Content": "It was dark.\\nHe went on.\\n"}]'),
        ("a.csv", b'title;text\r\nX;"It was dark.\nHe went on.\n"\r\n'),
    ],
)
def test_a_document_is_the_same_in_every_file(tmp_path: Path, name: str, contents: bytes) -> None:
    (tmp_path / name).write_bytes(contents)
    assert list(read_pieces(tmp_path / name)) == [("It was dark.\nHe went on.\n", True)]
    assert text_files(tmp_path) == [tmp_path / name]
    assert holds_text(tmp_path / name) and holds_text(tmp_path)


def test_a_record_is_a_document_and_marks_divide_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": "one<|endoftext|>two", "n": 1}, {"text": None, "n": 2}, {"text": "x" * 9000}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    pieces = list(read_pieces(tmp_path / "a.jsonl"))
    assert pieces[:2] == [("one", True), ("two", True)]
    assert [ends for _, ends in pieces[2:]] == [False, True]
    assert "".join(piece for piece, _ in pieces[2:]) == "x" * 9000
    assert "1 of 3 records left out: 'text' is empty" in caplog.text
    assert "not used, with the number of records: n (1)" in caplog.text


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a", "meta": {"id": 1}}, True),
        ({"text": "a", "instruction": "b", "output": "c"}, False),
        ({"messages": [], "text": "a"}, False),
        ({"prompt": "a", "completion": "b"}, False),
    ],
)
def test_records_of_texts_are_told_from_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, row: dict, expected: bool
) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (tmp_path / "val.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert holds_text(tmp_path / "train.jsonl") == holds_text(tmp_path) == expected
    assert not caplog.messages
    assert text_files(tmp_path) == [tmp_path / "train.jsonl"]
    assert len(caplog.messages) == 1


def test_white_space_alone_is_no_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = written(tmp_path, "\n \n\t\n" * 10)
    with pytest.raises(ValueError, match=r"there is no text in .*text\.txt"):
        tokenize_files([path], tokenizer, tmp_path, progress=False)


def test_records_without_a_text_are_no_text(tmp_path: Path) -> None:
    path = written(tmp_path, '{"prompt": "a", "completion": "b"}', "a.jsonl")
    with pytest.raises(ValueError, match="line 1: expected 'text' or 'content'; found prompt, co"):
        list(read_pieces(path))
    with pytest.raises(ValueError, match=r"book\.pdf is not text but a PDF: extract its text"):
        list(read_pieces(written(tmp_path, "%PDF-1.7", "book.pdf")))


# From pieces to a file of token ids


def test_the_bar_ends_at_the_size_of_the_files(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, "One.<|endoftext|>Twö.<|endoftext|>" * 30, "a.txt")
    files = [tmp_path / "a.txt", written(tmp_path, "Three. " * 100, "b.txt")]
    tokenize_files(files, tokenizer, tmp_path)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "100%" in last and "1.75k/1.75k" in last


@given(
    texts=st.lists(spaced_texts, min_size=1, max_size=3).filter(lambda t: any(map(documents_of, t)))
)
def test_a_token_file_holds_every_document_and_its_end(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    files = [written(folder, text, f"{i}.txt") for i, text in enumerate(texts)]
    token_file = tokenize_files(files, tokenizer, folder, progress=False)
    found = [token_file.tokens[span.start : span.stop].tolist() for span in token_file.documents()]
    documents = [document for text in texts for document in documents_of(text)]
    assert found == [[*tokenizer.encode(document), tokenizer.eos_id] for document in documents]
    assert sum(map(len, found)) == len(token_file.tokens)


@pytest.mark.parametrize("thread_characters", [1, 30, 100, 10**6])
def test_how_many_pieces_a_thread_takes_changes_nothing(
    many_pieces: TokenFile,
    scratch: Path,
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    thread_characters: int,
) -> None:
    monkeypatch.setattr(documents_module, "PIECE_CHARACTERS", 24)
    monkeypatch.setattr(corpus_module, "THREAD_CHARACTERS", thread_characters)
    found = tokenize_files([scratch / "pieces.txt"], tokenizer, tmp_path, progress=False)
    assert len(found.bounds) > 100
    assert np.array_equal(found.tokens, many_pieces.tokens)
    assert np.array_equal(found.bounds, many_pieces.bounds)
    assert np.array_equal(found.ends_document, many_pieces.ends_document)


def test_ids_above_uint16_survive(text_file: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    large = Tokenizer({**tokenizer.vocab, END_OF_TEXT: 2**16}, tokenizer.merges)
    tokens = tokenize_files([text_file], large, tmp_path, progress=False).tokens
    assert tokens[-1] == 2**16


class CountedGroups:
    """`tokenize_group`, counted; it can be made to fail at one of the groups."""

    calls, fails_at = 0, 0

    def __call__(self, group: Any, tokenizer: Tokenizer) -> Any:
        self.calls += 1
        if self.calls == self.fails_at:
            raise InterruptedError("as if the power had failed")
        return tokenize_group(group, tokenizer)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> CountedGroups:
    groups = CountedGroups()
    monkeypatch.setattr(corpus_module, "tokenize_group", groups)
    monkeypatch.setattr(corpus_module, "THREAD_CHARACTERS", 1)  # each piece is a group
    return groups


def test_the_same_files_are_tokenised_once(
    text_file: Path, tmp_path: Path, tokenizer: Tokenizer, counted: CountedGroups
) -> None:
    first = tokenize_files([text_file], tokenizer, tmp_path, progress=False)
    assert counted.calls == 2
    second = tokenize_files([text_file], tokenizer, tmp_path, progress=False)
    assert counted.calls == 2
    assert second.tokens.tolist() == first.tokens.tolist()
    assert second.documents() == first.documents()


def test_a_changed_file_is_tokenised_again(
    text_file: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    tokenize_files([text_file], tokenizer, tmp_path, progress=False)
    text_file.write_text("something else")
    tokens = tokenize_files([text_file], tokenizer, tmp_path, progress=False).tokens
    assert tokens.tolist() == [*tokenizer.encode("something else"), tokenizer.eos_id]


def test_another_vocabulary_tokenises_again(
    text_file: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    tokenize_files([text_file], tokenizer, tmp_path, progress=False)
    vocab = {**tokenizer.vocab, "e": tokenizer.vocab["o"], "o": tokenizer.vocab["e"]}
    swapped = Tokenizer(vocab, tokenizer.merges)  # the same merges, other ids
    tokens = tokenize_files([text_file], swapped, tmp_path, progress=False).tokens
    expected = [
        [*swapped.encode(d), swapped.eos_id] for d in documents_of(text_file.read_bytes().decode())
    ]
    assert tokens.tolist() == list(itertools.chain(*expected))


@pytest.mark.parametrize("fails_at", [1, 2])
def test_interrupted_tokenising_is_not_taken_for_finished(
    text_file: Path,
    tmp_path: Path,
    tokenizer: Tokenizer,
    counted: CountedGroups,
    fails_at: int,
) -> None:
    counted.fails_at = fails_at  # there are two
    with pytest.raises(OSError, match="as if the power had failed"):
        tokenize_files([text_file], tokenizer, tmp_path, progress=False)
    counted.fails_at = 0
    again = tokenize_files([text_file], tokenizer, tmp_path, progress=False)
    undisturbed = tokenize_files([text_file], tokenizer, tmp_path / "other", progress=False)
    assert again.tokens.tolist() == undisturbed.tokens.tolist()
    assert again.documents() == undisturbed.documents()


@pytest.mark.parametrize("name", ["tokens.npy", "pieces.npy"])
def test_an_interrupted_write_is_not_taken_for_finished(
    text_file: Path,
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    def replace(path: Path, target: Path) -> Path:
        if Path(target).name == name:
            raise InterruptedError("as if the power had failed")
        return original(path, target)

    original = Path.replace
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(OSError, match="as if the power had failed"):
            tokenize_files([text_file], tokenizer, tmp_path, progress=False)
    again = tokenize_files([text_file], tokenizer, tmp_path, progress=False)
    undisturbed = tokenize_files([text_file], tokenizer, tmp_path / "other", progress=False)
    assert again.tokens.tolist() == undisturbed.tokens.tolist()


@pytest.mark.parametrize("text", ["", END_OF_TEXT, END_OF_TEXT * 3], ids=["empty", "mark", "marks"])
def test_files_without_text_are_refused_each_time(
    tmp_path: Path, tokenizer: Tokenizer, text: str
) -> None:
    path = written(tmp_path, text)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no text in .*text\.txt"):
            tokenize_files([path], tokenizer, tmp_path, progress=False)


# Choosing documents

document_lengths = st.lists(st.integers(1, 30), min_size=1, max_size=40)


def laid_out(lengths: list[int], gap: int = 0) -> list[range]:
    """Documents of these lengths, one behind the other, with a gap between neighbors."""
    ends = itertools.accumulate(length + gap for length in lengths)
    return [range(end - gap - length, end - gap) for end, length in zip(ends, lengths, strict=True)]


def held_out(lengths: list[int], share: float, seed: int) -> tuple[list[range], list[range]]:
    """`hold_out` of documents that are long enough for it."""
    try:
        return hold_out(laid_out(lengths), share, seed)
    except ValueError:
        reject()


def tokens_of(documents: list[range]) -> list[int]:
    return [token for document in documents for token in document]


@given(lengths=document_lengths, share=st.floats(0.01, 0.9), seed=seeds)
def test_held_out_tokens_and_the_others_are_all_tokens_once(
    lengths: list[int], share: float, seed: int
) -> None:
    training, validation = held_out(lengths, share, seed)
    assert sorted(tokens_of(training) + tokens_of(validation)) == tokens_of(laid_out(lengths))
    TokenBatches(np.arange(sum(lengths)), training, 1, 2, seed)  # something to learn from
    assert [*sequential_batches(np.arange(sum(lengths)), validation, 1, 2)]  # and to score


@given(lengths=document_lengths, share=st.floats(0.01, 0.9), seed=seeds)
def test_the_held_out_share_is_what_was_asked_for(
    lengths: list[int], share: float, seed: int
) -> None:
    _, validation = held_out(lengths, share, seed)
    if len(lengths) >= 20:  # whole documents, at least one
        missing = share * sum(lengths) - sum(map(len, validation))
        is_shortest = len(validation) == 1 and len(validation[0]) == min(lengths)
        assert abs(missing) <= max(lengths) / 2 or is_shortest
    else:  # the end of each, to the next token
        for document, length in zip(validation, lengths, strict=True):
            assert abs(len(document) - share * length) <= 1


def test_enough_documents_are_held_out_whole_and_by_seed() -> None:
    documents = laid_out([5] * 30)
    by_seed = {seed: hold_out(documents, 0.2, seed)[1] for seed in range(3)}
    assert all(document in documents for chosen in by_seed.values() for document in chosen)
    assert by_seed[0] == hold_out(documents, 0.2, 0)[1]
    assert by_seed[0] != by_seed[1] != by_seed[2]


@pytest.mark.parametrize("seed", range(5))
def test_one_long_document_is_not_most_of_what_is_held_out(seed: int) -> None:
    documents = laid_out([1_000] * 29 + [200_000])
    _, validation = hold_out(documents, 0.05, seed)
    assert sum(map(len, validation)) == 11_000  # of 11,450


@pytest.mark.parametrize("lengths", [[100], [5] * 30], ids=["one", "many"])
@pytest.mark.parametrize("share", [-0.5, 0.0, 1.0, 1.5, float("nan")])
def test_a_share_to_hold_out_must_leave_something_to_both(lengths: list[int], share: float) -> None:
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        hold_out(laid_out(lengths), share, seed=0)


@pytest.mark.parametrize(
    ("lengths", "share", "left", "longest"),
    [
        ([], 0.1, 0, 0),
        ([3], 0.1, 2, 1),
        ([3], 0.9, 0, 3),
        ([9, 9], 0.1, 16, 1),
        ([1] * 30, 0.2, 24, 1),
    ],
)
def test_a_text_too_short_to_hold_out_a_part_is_refused(
    lengths: list[int], share: float, left: int, longest: int
) -> None:
    said = f"too short .* {left} tokens are left for training, .* held out has {longest};"
    with pytest.raises(ValueError, match=said):
        hold_out(laid_out(lengths), share, seed=0)
    assert hold_out(laid_out([20]), 0.1, seed=0) == ([range(18)], [range(18, 20)])  # just enough


@pytest.fixture(scope="module")
def many_pieces(scratch: Path, tokenizer: Tokenizer) -> TokenFile:
    """A file of two documents and some hundred pieces."""
    text = "the sea's the 42 the " * 90
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "PIECE_CHARACTERS", 24)
        path = written(scratch, text + END_OF_TEXT + text, "pieces.txt")
        return tokenize_files([path], tokenizer, scratch, progress=False)


@given(fraction=st.floats(0.001, 0.999), seed=seeds)
def test_a_fraction_is_that_share_of_the_pieces(
    many_pieces: TokenFile, fraction: float, seed: int
) -> None:
    chosen = many_pieces.documents(fraction, seed)
    starts = [0, *many_pieces.bounds[:-1].tolist()]
    pieces = [range(*span) for span in zip(starts, many_pieces.bounds.tolist(), strict=True)]
    assert abs(len(chosen) - fraction * len(pieces)) <= 1
    assert chosen == [piece for piece in pieces if piece in set(chosen)]  # in order, none twice


def test_a_fraction_is_chosen_by_seed(many_pieces: TokenFile) -> None:
    assert many_pieces.documents(0.3, seed=1) == many_pieces.documents(0.3, seed=1)
    assert many_pieces.documents(0.3, seed=1) != many_pieces.documents(0.3, seed=2)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_a_fraction_outside_zero_to_one_is_refused(many_pieces: TokenFile, fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction must lie in"):
        many_pieces.documents(fraction)


# Training batches. The token at place i is i itself, so that ids tell where they stood.


@st.composite
def corpora(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of TokenBatches: documents with gaps between them, enough for one batch or not."""
    documents = laid_out(draw(document_lengths.filter(lambda n: sum(n) > 1)), gap=3)
    return {
        "tokens": np.arange(documents[-1].stop + 3, dtype=np.uint32),
        "documents": documents,
        "batch_size": draw(st.integers(1, 4)),
        "context_length": draw(st.integers(2, 12)),
        "seed": draw(seeds),
    }


@given(corpus=corpora())
def test_batches_have_the_shape_asked_for(corpus: dict[str, Any]) -> None:
    (ids,) = take(TokenBatches(**corpus), 1)
    longest = sum(map(len, corpus["documents"]))
    assert ids.shape == (corpus["batch_size"], min(corpus["context_length"], longest))


@given(corpus=corpora())
def test_an_epoch_shows_no_token_twice(corpus: dict[str, Any]) -> None:
    batches = TokenBatches(**corpus)
    if batches.n_windows < batches.batch_size:
        return  # one batch is more than the text; rows are then repeated
    ids = torch.cat(take(batches, len(batches))).flatten()
    assert len(ids.unique()) == len(ids)


@given(corpus=corpora())
def test_an_epoch_leaves_out_less_than_a_batch_and_a_window(corpus: dict[str, Any]) -> None:
    batches = TokenBatches(**corpus)
    ids = torch.cat(take(batches, len(batches))).flatten()
    left_out = sum(map(len, corpus["documents"])) - len(ids.unique())
    assert left_out < (batches.batch_size + 1) * batches.context_length


def test_no_token_is_left_out_for_ever() -> None:
    documents = laid_out([40, 30, 31], gap=3)
    batches = TokenBatches(np.arange(120), documents, batch_size=3, context_length=7, seed=0)
    ids = torch.cat(take(batches, 30 * len(batches)))  # 30 epochs
    assert sorted(ids.unique().tolist()) == tokens_of(documents)


@given(corpus=corpora())
def test_rows_hold_the_documents_tokens_in_their_order_and_no_others(
    corpus: dict[str, Any],
) -> None:
    documents, batches = corpus["documents"], TokenBatches(**corpus)
    firsts, lasts = {d[0] for d in documents}, {d[-1] for d in documents}
    for row in torch.cat(take(batches, 2 * len(batches))).tolist():
        assert set(row) <= set(tokens_of(documents))
        for token, following in itertools.pairwise(row):
            assert following == token + 1 or (token in lasts and following in firsts)


@given(corpus=corpora(), start=st.integers(0, 50))
def test_starting_at_a_batch_is_skipping_those_before_it(
    corpus: dict[str, Any], start: int
) -> None:
    skipped = take(TokenBatches(**corpus), start + 4)[start:]
    started = take(TokenBatches(**corpus).part(start), 4)
    assert torch.equal(torch.stack(started), torch.stack(skipped))


def test_iterating_is_one_epoch_and_the_next_is_in_another_order() -> None:
    def made() -> TokenBatches:
        return TokenBatches(np.arange(99), [range(99)], batch_size=2, context_length=8, seed=0)

    batches = made()
    epochs = [[batch.token_ids for batch in batches] for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == 3 * [len(batches)] == [6, 6, 6]
    assert torch.equal(
        torch.stack([ids for epoch in epochs for ids in epoch]), torch.stack(take(made(), 18))
    )
    assert not torch.equal(torch.stack(epochs[0]), torch.stack(epochs[1]))


def test_an_epoch_that_is_not_read_to_its_end_is_over_too() -> None:
    first, second = (TokenBatches(np.arange(99), [range(99)], 2, 8, seed=0) for _ in range(2))
    next(iter(first))
    list(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.token_ids, other.token_ids)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_without_rows_is_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, not {batch_size}"):
        TokenBatches(np.arange(10), [range(10)], batch_size, 4, seed=0)


@pytest.mark.parametrize("documents", [[range(200)], laid_out([10] * 20)], ids=["one", "many"])
def test_seeds_and_epochs_differ_in_their_order(documents: list[range]) -> None:
    first, other = (TokenBatches(np.arange(200), documents, 2, 8, seed=seed) for seed in (0, 1))
    epoch = len(first)
    ids = torch.stack(take(first, 2 * epoch))
    assert not torch.equal(ids[:epoch], torch.stack(take(other, epoch)))
    assert not torch.equal(ids[:epoch], ids[epoch:])


@given(lengths=document_lengths.filter(lambda n: sum(n) > 3), seed=seeds)
def test_held_out_tokens_never_appear_in_training_batches(lengths: list[int], seed: int) -> None:
    training, validation = held_out(lengths, share=0.3, seed=seed)
    batches = TokenBatches(np.arange(sum(lengths)), training, 2, 5, seed)
    seen = torch.cat(take(batches, 3 * len(batches)))
    assert not set(seen.flatten().tolist()) & set(tokens_of(validation))


def test_every_token_of_a_training_batch_is_a_label() -> None:
    batch = next(iter(TokenBatches(np.arange(50), [range(50)], 2, 8, seed=0)))
    assert torch.equal(batch.labels, batch.token_ids)
    assert batch.attention_mask is None


@pytest.mark.parametrize("documents", [[], [range(0)], [range(3, 4), range(9, 9)]], ids=repr)
def test_a_text_without_two_tokens_is_refused(documents: list[range]) -> None:
    with pytest.raises(ValueError, match="fewer than two tokens"):
        TokenBatches(np.arange(10), documents, batch_size=1, context_length=4, seed=0)


def test_a_batch_larger_than_the_text_is_said(caplog: pytest.LogCaptureFixture) -> None:
    TokenBatches(np.arange(50), [range(50)], batch_size=6, context_length=8, seed=0)
    assert not caplog.text
    TokenBatches(np.arange(50), [range(50)], batch_size=7, context_length=8, seed=0)
    assert "7 x 8 tokens repeats some of the 50 training tokens" in caplog.text


@pytest.mark.parametrize("context_length", [0, 1])
def test_a_window_that_predicts_nothing_is_refused(context_length: int) -> None:
    with pytest.raises(ValueError, match=f"must be at least 2, not {context_length}"):
        TokenBatches(np.arange(10), [range(10)], 1, context_length, seed=0)
    with pytest.raises(ValueError, match=f"must be at least 2, not {context_length}"):
        next(sequential_batches(np.arange(10), [range(10)], 1, context_length))


def test_windows_that_do_not_move_on_are_refused() -> None:
    with pytest.raises(ValueError, match="stride must be at least 1, not 0"):
        sliding_windows([torch.arange(9)], context_length=4, stride=0)


# Validation batches


@given(
    lengths=st.lists(st.integers(0, 30), max_size=12),
    context_length=st.integers(2, 12),
    data=st.data(),
)
def test_windows_of_any_stride_predict_every_token_but_each_text_s_first_once(
    lengths: list[int], context_length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context_length - 1))
    documents = laid_out(lengths)
    rows = sliding_windows([torch.tensor([*span]) for span in documents], context_length, stride)
    assert all(len(row.token_ids) <= context_length for row in rows)
    predicted = [token for row in rows for token in row.token_ids[row.n_context :].tolist()]
    assert sorted(predicted) == tokens_of([document[1:] for document in documents])


@given(
    lengths=st.lists(st.integers(0, 30), max_size=12),
    batch_size=st.integers(1, 4),
    context_length=st.integers(2, 12),
)
def test_validation_predicts_every_token_but_each_document_s_first_once(
    lengths: list[int], batch_size: int, context_length: int
) -> None:
    documents = laid_out(lengths, gap=3)
    tokens = np.arange(sum(lengths) + 3 * len(lengths))
    predicted = []
    for batch in sequential_batches(tokens, documents, batch_size, context_length):
        assert batch.labels.shape[0] <= batch_size
        assert batch.labels.shape[1] <= context_length
        targets = batch.labels[:, 1:]
        asked = targets != IGNORED
        assert torch.equal(
            targets[asked], batch.token_ids[:, :-1][asked] + 1
        )  # from the one before
        predicted += targets[asked].tolist()
    assert sorted(predicted) == tokens_of([document[1:] for document in documents])


# Padding


@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=5), seed=seeds)
def test_padding_comes_from_lengths_even_where_the_padding_id_is_a_token(
    lengths: list[int], seed: int
) -> None:
    rows = [random_ids(length, seed=seed) % 2 for length in lengths]  # zeros and ones
    batch = pad_batch(rows)
    for i, row in enumerate(rows):
        rest = max(lengths) - len(row)
        assert batch.token_ids[i, : len(row)].tolist() == row.tolist()
        assert batch.labels[i].tolist() == row.tolist() + [IGNORED] * rest
        if batch.attention_mask is not None:
            assert batch.attention_mask[i].tolist() == [1] * len(row) + [0] * rest
    assert (batch.attention_mask is None) == (len(set(lengths)) == 1)


@pytest.mark.parametrize("lengths", [[3, 3], [3, 1]], ids=["full", "padded"])
def test_a_batch_moves_as_a_whole(lengths: list[int]) -> None:
    moved = pad_batch([random_ids(length) for length in lengths]).to(torch.device("meta"))
    parts = [moved.token_ids, moved.labels, moved.attention_mask]
    assert all(part is None or part.device.type == "meta" for part in parts)


# ---- text held out that is learned from too


@given(
    st.lists(st.integers(0, 2), max_size=60), st.lists(st.integers(0, 2), max_size=60), st.data()
)
def test_copied_blocks_are_those_a_plain_search_finds(
    learned: list[int], held_out: list[int], data: st.DataObject
) -> None:
    copy = data.draw(st.integers(0, len(learned)))
    learned, held_out = [*learned, *range(20)], [*held_out, *learned[copy:], *range(20)]
    cut = len(held_out) // 3
    parts = [range(cut), range(cut, len(held_out))]
    blocks = [
        held_out[start : start + 16]
        for part in parts
        for start in range(part.start, part.stop - 15, 16)
    ]
    windows = [learned[i : i + 16] for i in range(len(learned) - 15)]
    arrays = (np.array(learned, np.uint16), np.array(held_out, np.uint16))
    found = count_copied_blocks(arrays[0], [range(len(learned))], arrays[1], parts)
    assert found == (sum(block in windows for block in blocks), len(blocks))


def test_copies_are_found_across_the_pieces_of_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "AT_ONCE", 7)
    tokens = np.arange(100, dtype=np.uint16)
    assert count_copied_blocks(tokens, [range(100)], tokens[3:], [range(90)]) == (5, 5)
    assert count_copied_blocks(tokens, [range(10)], tokens, [range(10)]) == (0, 0)
