"""Reading JSON with a helpful error; writing files so that a crash leaves the old one or the new
one, whole."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(aside)
        aside.chmod(0o666 & ~current_umask())  # safetensors makes its files private
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def current_umask() -> int:
    umask = os.umask(0)  # it can only be read by setting it
    os.umask(umask)
    return umask


def write_text(path: Path, text: str) -> None:
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8", newline="\n"))


def write_json(path: Path, contents: Any) -> None:
    write_text(path, json.dumps(contents, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The contents of a JSON file. Raises ValueError, naming the file, if it is not valid."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # json.JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def writable_folder(path: str | Path) -> Path:
    """Make a folder, if need be, and make sure that files can be written into it: before long work,
    not after. Raises OSError."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise OSError(f"cannot write into {folder}: {error.strerror}") from None
    return folder
