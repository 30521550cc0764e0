"""Folders of data: which files are read, and what each is for."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

PURPOSES = {  # words in the name of a file, or of its folder
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
ABOUT = ("readme", "license", "licence", "notice", "citation", "changelog", "contributing")


def visible_files(folder: Path) -> list[Path]:
    """All files in and below a folder, in the order of their names, without hidden ones (.git,
    and the ._* that macOS writes beside each file)."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(f for f in files if not any(p[0] == "." for p in f.relative_to(folder).parts))


def is_about_the_data(path: Path) -> bool:
    """Is this a README, a license or the like, which lies beside the data in what is published?"""
    return path.name.lower().split(".")[0] in ABOUT


def form_of(path: Path) -> str:
    """The ending of a file's name in lower case, without .gz: ".csv" of "Data.CSV.gz"."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def by_purpose(files: Sequence[Path], folder: Path) -> dict[str, list[Path]]:
    """{"train": [...], "validation": [...], "test": [...]}, by a word in the name of each file or
    its folder in `folder`: train.json, val.json, dev-0.csv, test/0.parquet. Files without such a
    word are for training, if none is called so (beside them they may be anything)."""
    return grouped({file: purpose_of(file.relative_to(folder)) for file in files})


def grouped(purposes: Mapping[Path, str | None]) -> dict[str, list[Path]]:
    """The paths for each purpose. Those without one (None) are for training, if no other is."""
    found: dict[str, list[Path]] = {name: [] for name in PURPOSES}
    for path, purpose in purposes.items():
        if purpose:
            found[purpose].append(path)
    found["train"] = found["train"] or [path for path, purpose in purposes.items() if not purpose]
    return found


def purpose_to_score(parts: Mapping[str, list[Path]], first: str = "validation") -> str:
    """Which part of a folder to measure on, where the folder is given for this: "validation", or
    else "test" (first="test": the other way round), or else "train"."""
    other = "test" if first == "validation" else "validation"
    return next((purpose for purpose in (first, other) if parts[purpose]), "train")


def purpose_of(path: Path) -> str | None:
    """The purpose that a word of the path names: "test" of 20news-test/0.txt, None of a.txt. Of
    several it is the last in PURPOSES."""
    words = set(re.split(r"[^a-z]+", path.as_posix().lower()))
    named = [purpose for purpose, usual in PURPOSES.items() if words & set(usual)]
    return named[-1] if named else None


def log_left_out(folder: Path, files: Sequence[Path], why: str) -> None:
    """Name once the files of a folder that are not read."""
    if files:
        names = [file.relative_to(folder).as_posix() for file in files]
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        count = "1 file" if len(files) == 1 else f"{len(files)} files"
        logger.warning("%s: %s left out, %s: %s", folder, count, why, shown)
