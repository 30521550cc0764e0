"""Files of text, or of records of texts -> documents, in pieces of a few pages."""

from collections.abc import Iterator
from pathlib import Path

from gpt2mini.data.decoding import open_text
from gpt2mini.data.exchanges import COMPLETION_NAMES, MESSAGES_NAMES, PROMPT_NAMES, TEXT_NAMES
from gpt2mini.data.folders import (
    by_purpose,
    form_of,
    is_about_the_data,
    log_left_out,
    visible_files,
)
from gpt2mini.data.records import EmptyField, Omissions, read_records
from gpt2mini.data.rows import is_file_of_records
from gpt2mini.tokenizer import END_OF_TEXT

TEXT_ENDINGS = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org")  # also with .gz
ASKED = (*PROMPT_NAMES, *COMPLETION_NAMES, *MESSAGES_NAMES, "chosen")  # not of texts alone
READING = 2  # counts changes of what is read from a file, so that older results are not used again
PIECE_CHARACTERS = 8192  # a few pages: the unit of `fraction`
READ_CHARACTERS = 2**16  # fits the processor's cache
# What \s means in GPT-2's word pattern (Unicode's White_Space; Python's isspace has four more).
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


def text_files(path: str | Path) -> list[Path]:
    """The file itself, or the files of text in and below a folder, in the order of their names:
    those that end in TEXT_ENDINGS, or else the files of records to learn from. A warning names the
    others.

    Hidden files are no part of a folder. Raises FileNotFoundError; ValueError for a folder without
    text.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a text file nor a folder of text files")
    files = files_of(path)
    if not files:
        raise ValueError(f"{path} holds no file that ends in {', '.join(TEXT_ENDINGS)}")
    left_out = [file for file in visible_files(path) if file not in files]
    log_left_out(path, left_out, "by their names")
    return files


def files_of(folder: Path) -> list[Path]:
    """The files of text in a folder, or else those of records to learn from. A README is text only
    where there is nothing else."""
    everything = visible_files(folder)
    texts = [file for file in everything if form_of(file) in TEXT_ENDINGS]
    records = [file for file in everything if is_file_of_records(file)]
    if records and all(map(is_about_the_data, texts)):
        return by_purpose(records, folder)["train"] or records
    return texts


def holds_text(path: Path) -> bool:
    """Is this a text or a folder of texts, or are its records texts alone, `{"text": ...}`?"""
    if path.is_dir():
        path = next(iter(files_of(path)), path)
    if not is_file_of_records(path) or not path.is_file():
        return not is_file_of_records(path)
    first = next(read_records(path))
    return first.find(TEXT_NAMES) is not None and first.find(ASKED) is None


def read_pieces(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether a document ends here): a file in pieces of about PIECE_CHARACTERS.

    A document is a file, or a record's text; <|endoftext|> marks in it divide it into several.
    Pieces are cut before white space, where GPT-2's word pattern always starts a new word, so that
    the ids are those of the whole text.
    """
    if is_file_of_records(path):
        for text in record_texts(path):
            yield from document_pieces(text.split(END_OF_TEXT))
        return
    with open_text(path) as file:
        rest = ""
        while block := file.read(READ_CHARACTERS):
            *documents, rest = (rest + block).split(END_OF_TEXT)
            yield from document_pieces(documents)
            *pieces, rest = cut(rest) or [""]
            while pieces and len(rest) < len(END_OF_TEXT):  # it may be the start of a mark
                rest = pieces.pop() + rest
            yield from ((piece, False) for piece in pieces)
        if rest:
            yield rest, True


def document_pieces(documents: list[str]) -> Iterator[tuple[str, bool]]:
    """Documents, or the ends of documents, in pieces."""
    for document in documents:
        pieces = cut(document)
        yield from ((piece, False) for piece in pieces[:-1])
        yield from ((piece, True) for piece in pieces[-1:])


def record_texts(path: Path) -> Iterator[str]:
    """The text of each record. Empty ones are left out; a warning gives their number."""
    left_out = Omissions(path)
    for record in read_records(path):
        try:
            text = record.required_text(*TEXT_NAMES)
        except EmptyField as error:
            left_out.drop(error.reason, error.place)
            continue
        left_out.see(record)
        yield text
    left_out.log()


def cut(text: str) -> list[str]:
    """Pieces of at most PIECE_CHARACTERS, split before white space if their second half has any."""
    pieces, start = [], 0
    while len(text) - start > PIECE_CHARACTERS:
        end = start + PIECE_CHARACTERS
        middle = start + PIECE_CHARACTERS // 2
        best = text.rfind("\n", middle, end)
        if best < 0:
            best = text.rfind(" ", middle, end)
        while best > start and text[best - 1] in WHITE_SPACE:
            best -= 1  # to the start of a run of white space
        if best > start:
            end = best
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]] if text[start:] else pieces
