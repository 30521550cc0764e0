"""Files of text -> characters: UTF-8 or UTF-16, compressed or not, any line ends.

Everything that reads text from a file of the user reads it here: UTF-8 with or without a byte order
mark, UTF-16 with one (or without, where every other byte is NUL), gzip recognized by its first
bytes. Any other encoding would have to be guessed, and a wrong guess would be learned in silence:
it is an error that says what to do.
"""

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

GZIP = b"\x1f\x8b"
MARKS = (  # byte order marks; that of UTF-16-LE begins that of UTF-32-LE
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
HEAD_BYTES = 4096  # enough to tell the encoding
BINARY = (  # first bytes of files that are not text
    (b"PK\x03\x04", "a zip archive, or a document of Excel or Word: save it as CSV or plain text"),
    (b"\xd0\xcf\x11\xe0", "an old document of Excel or Word: save it as CSV or plain text"),
    (b"%PDF", "a PDF: extract its text first (pdftotext)"),
    (b"PAR1", "a Parquet file: its name should end in .parquet"),
    (b"BZh", "compressed with bzip2: decompress it first"),
    (b"\xfd7zXZ", "compressed with xz: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: decompress it first"),
)


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    r"""Open a file to read its characters, whichever of the encodings above it has.

    newline: as of `open`; None turns \r\n and \r into \n. Only these end a line, never U+2028 or
    U+0085. Raises ValueError for a file that is not text, or not in one of these encodings, with
    the line and the remedy.
    """
    with open_bytes(path) as binary:
        head = peek(binary, path)
        with io.TextIOWrapper(binary, encoding_of(head, path), newline=newline) as text:
            try:
                yield text
            except UnicodeError:
                raise ValueError(describe_encoding_error(path, text.encoding)) from None
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{path} is not a whole gzip file: {error}") from None


def read_text(path: str | Path) -> str:
    r"""All characters of a file; its line ends become \n."""
    with open_text(Path(path)) as file:
        return file.read()


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) for each line that is not blank."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.removesuffix("\n")


def open_bytes(path: Path) -> io.BufferedReader:
    with path.open("rb") as file:
        compressed = file.read(len(GZIP)) == GZIP
    if compressed:
        return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(path)))
    return path.open("rb")


def peek(binary: io.BufferedReader, path: Path) -> bytes:
    """The first bytes, which stay to be read."""
    try:
        head = binary.read(HEAD_BYTES)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None
    binary.seek(0)
    return head


def encoding_of(head: bytes, path: Path) -> str:
    """The encoding of a text that begins with these bytes. Raises ValueError if it is no text."""
    for mark, what in BINARY:
        if head.startswith(mark):
            raise ValueError(f"{path} is not text but {what}")
    for mark, name in MARKS:
        if head.startswith(mark):
            return name
    first, second = (head[start::2].count(0) for start in (0, 1))  # NULs of each pair of bytes
    pairs = max(1, len(head) // 2)
    if first + second > pairs and min(first, second) > pairs // 10:
        raise ValueError(f"{path} is not text: most of its bytes are NUL")
    if first == 0 and is_every_other(second, pairs):
        return "utf-16-le"
    if second == 0 and is_every_other(first, pairs):
        return "utf-16-be"
    return "utf-8"


def is_every_other(nuls: int, pairs: int) -> bool:
    """Are so many NULs, all of them in the same byte of a pair, certain to be UTF-16?

    Most characters of English have one there; of other scripts only spaces and line ends do.
    """
    return nuls > pairs / 2 or (nuls >= 16 and nuls > pairs / 10)


def describe_encoding_error(path: Path, encoding: str) -> str:
    """The first line that cannot be decoded, and what to do."""
    if not encoding.startswith("utf-8"):
        return f"{path} is not valid {encoding.upper()}: save it as UTF-8"
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return (
                    f"{path}, line {number}: not UTF-8 text (byte {line[error.start]:#04x} after "
                    f"{line[max(0, error.start - 20) : error.start].decode(errors='replace')!r}): "
                    "convert it first, with iconv -f latin1 -t utf-8, or from the encoding it has"
                )
    return f"{path} is not UTF-8 text"
