"""Data files of the zero-shot tasks: found in a folder by their usual names, or downloaded."""

import hashlib
import logging
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gpt2mini.checkpoints.download import cache_folder, download_files
from gpt2mini.data.records import EmptyField, Omissions, Record, read_records
from gpt2mini.files import write_aside

logger = logging.getLogger(__name__)

Example = TypeVar("Example")

# The first of these names that exists is used.
USUAL_NAMES = {
    "lambada": ["lambada_test.jsonl"],
    "lambada-original": ["lambada_test_plain_text.txt"],
    "wikitext-2": ["wikitext-2.test.txt", "wikitext-2/wiki.test.tokens"],
    "wikitext-2-raw": ["wikitext-2-raw.test.txt", "wikitext-2-raw/wiki.test.raw"],
    "wikitext-103": ["wikitext-103.test.txt", "wikitext-103/wiki.test.tokens"],
    "enwik8": ["enwik8"],
    "text8": ["text8"],
    "cbt-cn": ["cbtest_CN_valid_2000ex.txt", "cbtest_CN_test_2500ex.txt"],
    "cbt-ne": ["cbtest_NE_valid_2000ex.txt", "cbtest_NE_test_2500ex.txt"],
    "hellaswag": ["hellaswag_val.jsonl", "hellaswag_val.part1.jsonl"],
}


@dataclass(frozen=True)
class Source:
    """The URL of a task's file, plain or as the only file in a zip."""

    address: str
    sha256: str = ""  # of the task's file, if known
    last: int = 0  # use the last so many bytes; 0: all


SOURCES = {
    "lambada": Source(
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    ),
    "wikitext-2": Source(
        "https://raw.githubusercontent.com/pytorch/examples/"
        "77f55b912142e11fcfdf5b530231fb9c52f181e8/word_language_model/data/wikitext-2/test.txt",
        "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    ),
    # the usual test set is the last 5 of 100 MB
    "enwik8": Source("http://mattmahoney.net/dc/enwik8.zip", last=5_000_000),
    "text8": Source("http://mattmahoney.net/dc/text8.zip", last=5_000_000),
    "hellaswag": Source(
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
    ),
}


def find_task_file(task: str, folder: str | Path | None = None) -> Path:
    """The path of a task's file, in `folder`; by default in the cache, downloaded if missing.

    Raises FileNotFoundError if it is not in the folder or cannot be downloaded for this task, and
    ConnectionError if the download fails.
    """
    names = USUAL_NAMES.get(task, [])
    if folder is not None or task not in SOURCES:
        found = [Path(folder) / n for n in names if (Path(folder) / n).is_file()] if folder else []
        if not found:
            raise FileNotFoundError(
                f"the task {task} needs a file: give {task}=path, or a folder that has "
                f"{' or '.join(names) or 'it'}"
            )
        return found[0]
    return download_task_file(task, SOURCES[task], cache_folder() / "tasks" / names[0])


def download_task_file(task: str, source: Source, path: Path) -> Path:
    """Download, unpack and verify a task's file, unless it exists."""
    if path.is_file():
        return path
    site, _, name = source.address.rpartition("/")
    downloaded = path.parent / f"{task}.download" / name
    try:
        download_files(site, {name: None}, downloaded.parent)
    except OSError as error:
        raise ConnectionError(
            f"the task {task} could not be downloaded from {source.address} ({error}); download it "
            f"elsewhere and give {task}=path"
        ) from error
    try:
        data = verified(unpack(downloaded), source)
    except (ValueError, zipfile.BadZipFile, zlib.error) as error:
        downloaded.unlink()
        raise ConnectionError(
            f"{source.address} did not give the file of the task {task} ({error}): try again, or "
            f"give {task}=path"
        ) from error
    write_aside(path, lambda aside: aside.write_bytes(last_part(data, source.last)))
    downloaded.unlink(missing_ok=True)
    logger.info("%s: %s", task, path)
    return path


def last_part(data: bytes, size: int) -> bytes:
    """The last `size` bytes, from the first complete UTF-8 character on; 0: all."""
    return data[-size:].lstrip(bytes(range(0x80, 0xC0))) if size else data


def verified(data: bytes, source: Source) -> bytes:
    """The data of a task. Raises ValueError for other data, such as a page to log in."""
    found = hashlib.sha256(data).hexdigest()
    if source.sha256 and found != source.sha256:
        raise ValueError(f"it has the sha256 {found}; expected {source.sha256}")
    if source.address.endswith(".jsonl") and not data.startswith(b"{"):
        raise ValueError(f"it begins with {data[:20]!r}; expected JSON lines")
    return data


def unpack(file: Path) -> bytes:
    if file.suffix != ".zip":
        return file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        return archive.read(archive.namelist()[0])


def read_examples(path: Path, read: Callable[[Record], Example]) -> list[Example]:
    """What `read` makes of each record. Those with an empty field are left out; a warning gives
    their number. Raises ValueError if none is left."""
    left_out, found = Omissions(path), []
    for record in read_records(path):
        try:
            found.append(read(record))
        except EmptyField as error:
            left_out.drop(error.reason, error.place)
    left_out.records += len(found)
    left_out.log()
    if not found:
        raise ValueError(f"{path}: all records are left out: {next(iter(left_out.reasons))}")
    return found
