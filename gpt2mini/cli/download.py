"""Fetch a published model, once, and say where it is.

Examples:
  gpt2mini download gpt2
  gpt2mini download 355M --to models/gpt2-medium
"""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tyro.conf import Positional

from gpt2mini.checkpoints import find_model
from gpt2mini.checkpoints.hub import files_that_are_read
from gpt2mini.files import Write, local_path, writable_folder, write_together


@dataclass(frozen=True)
class Flags:
    name: Positional[str]  # gpt2 ... gpt2-xl, 124M ... 1558M, or owner/name on the Hub
    to: str | None = None  # a folder to copy the files to; None: only the cache


def run(flags: Flags) -> None:
    folder = find_model(flags.name)
    if flags.to and folder.resolve() == local_path(flags.to).resolve():
        print(f"{flags.to} is the folder of {flags.name} itself: there is nothing to copy")
        return
    if flags.to:
        copy_model(folder, writable_folder(flags.to))
    print(flags.to or folder)


def copy_model(folder: Path, target: Path) -> None:
    """Copy the files of a model: all of them or none. Raises FileExistsError if the target has
    files of another model, which would be read together with these, or instead."""
    files = [file for file in folder.iterdir() if file.is_file() and file.name[0] != "."]
    copies: dict[Path, Write] = {
        target / file.relative_to(folder): partial(shutil.copyfile, file)
        for file in {*files, *files_that_are_read(folder)}
    }
    if others := [path.name for path in files_that_are_read(target) if path not in copies]:
        raise FileExistsError(
            f"{target} holds files of another model, which would be read too: {', '.join(others)}. "
            "Choose another folder, or take them out"
        )
    for parent in {path.parent for path in copies}:
        parent.mkdir(exist_ok=True)
    write_together(copies)
