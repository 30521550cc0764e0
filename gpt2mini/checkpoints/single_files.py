"""Models of other projects that are one file: nanoGPT's, llm.c's, GGUF."""

from collections.abc import Callable
from pathlib import Path

from gpt2mini.checkpoints.gguf import read_gguf
from gpt2mini.checkpoints.llmc import is_llmc, read_llmc
from gpt2mini.checkpoints.nanogpt import read_nanogpt
from gpt2mini.checkpoints.stored import Checkpoint, CheckpointError

CONFIGS = ("config.json", "hparams.json")  # folders with one of these are read as a whole


def reader_of(file: Path) -> Callable[[Path], Checkpoint] | None:
    """How a model's file is read; None: it is no such file."""
    if file.suffix == ".gguf":
        return read_gguf
    if file.suffix in (".pt", ".pth"):
        return read_nanogpt
    return read_llmc if file.suffix == ".bin" and is_llmc(file) else None


def find_single_file(path: Path) -> Path | None:
    """The file of a model that is one: the path itself, or the only one in that folder. Raises
    CheckpointError for a folder with several."""
    found = single_files(path)
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{path} has several models, {names}: give the path of one file")
    return found[0] if found else None


def single_files(path: Path) -> list[Path]:
    """All such files: the path itself, or those in that folder, if it is not read as a whole."""
    if path.is_file():
        return [path] if reader_of(path) else []
    if not path.is_dir() or any((path / name).is_file() for name in CONFIGS):
        return []
    found = [path / "ckpt.pt", *sorted(path.glob("*.gguf")), *sorted(path.glob("*.bin"))]
    return [file for file in found if file.is_file() and reader_of(file)]


def read_single_file(file: Path) -> Checkpoint:
    """The checkpoint of a file that `find_single_file` has found."""
    read = reader_of(file)
    assert read is not None
    return read(file)
