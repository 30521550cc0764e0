"""Fetch a published model, once, and say where it is.

Examples:
  gpt2mini download gpt2
  gpt2mini download 355M --to models/gpt2-medium
"""

import shutil
from dataclasses import dataclass

from tyro.conf import Positional

from gpt2mini.checkpoints import find_model
from gpt2mini.files import writable_folder


@dataclass(frozen=True)
class Flags:
    name: Positional[str]  # gpt2 ... gpt2-xl, 124M ... 1558M, or owner/name on the Hub
    to: str | None = None  # a folder to copy the files to; None: only the cache


def run(flags: Flags) -> None:
    folder = find_model(flags.name)
    if flags.to:
        target = writable_folder(flags.to)
        for file in folder.iterdir():
            if file.is_file() and not file.name.startswith("."):
                shutil.copyfile(file, target / file.name)
    print(flags.to or folder)
