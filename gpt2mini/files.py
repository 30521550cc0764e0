"""Paths as people type them; reading JSON with a helpful error; writing files so that a crash
leaves the old one or the new one, whole."""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from safetensors import SafetensorError

ONE_AT_A_TIME = Lock()

Write = Callable[[Path], object]  # fills the file that it is given


def local_path(path: str | Path) -> Path:
    """The path, with the user's home folder in place of a leading `~`. Raises ValueError where
    there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error} Give the path without ~") from None


def write_aside(path: Path, write: Write) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place."""
    write_together({path: write})


def write_together(files: dict[Path, Write]) -> None:
    """Fill temporary files beside the paths, all of them, before the first is renamed into place.

    Files that belong together are so old together or new together, but for the moment between two
    renames.
    """
    asides = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in files}
    try:
        for path, aside in asides.items():
            with naming(path):
                files[path](aside)
                aside.chmod(0o666 & ~current_umask())  # safetensors makes its files private
        for path, aside in asides.items():
            with naming(path):
                aside.replace(path)
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A file that cannot be written is an OSError that names it, and not the temporary one."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter is its own kind of OSError
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {path}: {reason}") from error


def current_umask() -> int:
    with ONE_AT_A_TIME:
        umask = os.umask(0)  # it can only be read by setting it, for all threads
        os.umask(umask)
    return umask


def text_writer(text: str) -> Write:
    return lambda path: path.write_text(text, encoding="utf-8", newline="\n")


def write_text(path: Path, text: str) -> None:
    write_aside(path, text_writer(text))


def as_json(contents: Any) -> str:
    finite = without_infinities(contents)
    return json.dumps(finite, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def without_infinities(contents: Any) -> Any:
    """Contents for JSON, which knows no infinity and no NaN: null instead."""
    if isinstance(contents, dict):
        return {name: without_infinities(value) for name, value in contents.items()}
    if isinstance(contents, list | tuple):
        return [without_infinities(value) for value in contents]
    return None if isinstance(contents, float) and not math.isfinite(contents) else contents


def write_json(path: Path, contents: Any) -> None:
    write_text(path, as_json(contents))


def refuse_placeholder(path: Path) -> None:
    """Raise ValueError for a Git LFS pointer or a web page that lies where the file should be."""
    with path.open("rb") as file:
        start = file.read(200).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a Git LFS pointer, which stands for the file and does not hold it: run "
            "`git lfs pull` in the folder it came from, or download the file itself"
        )
    if start.startswith((b"<!doctype html", b"<html")):
        raise ValueError(
            f"{path} is a web page (HTML), saved in place of the file: download the file itself "
            "(on the Hub from /resolve/main/, not /blob/main/)"
        )


def read_json(path: Path) -> Any:
    """The contents of a JSON file, in UTF-8 with or without a byte order mark (or in UTF-16).
    Raises ValueError, naming the file, if it is not valid."""
    refuse_placeholder(path)
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # json.JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def writable_folder(path: str | Path) -> Path:
    """Make a folder, if need be, and make sure that files can be written into it: before long work,
    not after. Raises OSError."""
    folder = local_path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").write_text("", encoding="utf-8")
        (folder / ".writable").unlink(missing_ok=True)  # another process may do the same
    except OSError as error:
        raise OSError(f"cannot write into {folder}: {error.strerror}") from None
    return folder


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other process may come here with the same folder. Raises BlockingIOError if one
    holds it already. The system releases the lock when its holder ends, however it ends."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"another run is at work in {folder}: wait for it or stop it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
