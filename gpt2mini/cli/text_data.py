"""The text that jobs read: tokenized, and divided into what is learned and what is held out."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2mini import Tokenizer
from gpt2mini.data.corpus import TokenFile, hold_out, text_files, tokenize_files
from gpt2mini.data.folders import (
    PURPOSES,
    by_purpose,
    is_about_the_data,
    log_left_out,
    purpose_of,
    purpose_to_score,
)
from gpt2mini.data.overlap import count_copied_blocks, count_copies
from gpt2mini.data.rows import is_file_of_records, split_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextSplit:
    """Token ranges to learn from and to score; the latter may be of another file."""

    corpus: TokenFile
    training: list[range]
    held_out_corpus: TokenFile
    held_out: list[range]
    source: str  # of the text held out

    def __str__(self) -> str:
        return (
            f"{sum(map(len, self.training)):,} tokens to learn from, "
            f"{sum(map(len, self.held_out)):,} held out ({self.source})"
        )


def training_and_held_out_files(data: str, held_out: str | None) -> tuple[list[Path], list[Path]]:
    """Text files to learn from, and those held out: of `held_out`; else of the folder `data`, if
    its files say what they are for (train.txt beside valid.txt); else none."""
    files, parts = files_and_parts(data)
    given = []
    if held_out:
        others, its_parts = files_and_parts(held_out)
        given = its_parts[purpose_to_score(its_parts)] if its_parts else others
    if not parts or not parts["train"]:
        return files, given
    used = [file for part in parts.values() for file in part]
    log_left_out(Path(data), [file for file in files if file not in used], "by their names")
    return parts["train"], given or parts["validation"] or parts["test"]


def files_and_parts(source: str) -> tuple[list[Path], dict[str, list[Path]]]:
    """The text files of a source, and those of a folder by their purpose, if their names say it."""
    files, folder = text_files(source), Path(source)
    if not folder.is_dir():
        return files, {}
    if is_file_of_records(files[0]):
        return files, split_files(folder)
    return files, by_purpose(files, folder) if is_divided(files, folder) else {}


def is_divided(files: list[Path], folder: Path) -> bool:
    """Whether the names of all files but READMEs say what they are for; or there is a train.txt
    beside a valid.txt or a test.txt. (One word in the title of one of many books says nothing.)"""
    alone = {
        purpose
        for file in files
        for purpose, usual in PURPOSES.items()
        if file.name.lower().split(".")[0] in usual
    }
    return ("train" in alone and len(alone) > 1) or all(
        purpose_of(file.relative_to(folder)) for file in files if not is_about_the_data(file)
    )


def split_text(
    files: list[Path],
    held_out_files: list[Path],
    tokenizer: Tokenizer,
    folder: Path,
    fraction: float,
    validation_share: float,
    seed: int,
) -> TextSplit:
    """Tokenize into `folder`, and hold out the files given or else a share: whole documents, where
    there are at least 20."""
    corpus = tokenize_files(files, tokenizer, folder)
    documents = corpus.documents()
    if held_out_files:
        other = tokenize_files(held_out_files, tokenizer, folder)
        training, held_out = documents, other.documents()
        if not any(len(document) > 1 for document in held_out):
            raise ValueError(f"{held_out_files[0]} is too short: there is no token to predict")
        source = in_words(held_out_files)
    else:
        other, source = corpus, f"{validation_share:.3g} of the text"
        training, held_out = hold_out(documents, validation_share, seed)
    if fraction != 1:
        training = intersection(corpus.documents(fraction, seed), training)
    if held_out_files:
        warn_of_copies(*count_copied_blocks(corpus.tokens, training, other.tokens, held_out))
    elif copies := count_copies(corpus.tokens, training, held_out):
        message = "%d of %d documents held out are learned from too: their loss says less"
        logger.warning(message, copies, len(held_out))
    return TextSplit(corpus, training, other, held_out, source)


def in_words(files: Sequence[Path]) -> str:
    """Their names, or the first ones."""
    names = [file.name for file in files]
    return ", ".join(names if len(names) < 4 else [*names[:2], f"... {len(names)} files"])


def warn_of_copies(copied: int, blocks: int) -> None:
    """Say how much of the text held out is learned from, if that is more than a chance phrase."""
    if copied > blocks / 100:
        message = "%.0f %% of the text held out is learned from too: its loss says less"
        logger.warning(message, 100 * copied / blocks)


def intersection(first: list[range], second: list[range]) -> list[range]:
    """What lies in ranges of both; within each list they are in order and do not overlap."""
    found, i, k = [], 0, 0
    while i < len(first) and k < len(second):
        both = range(max(first[i].start, second[k].start), min(first[i].stop, second[k].stop))
        found += [both] if both else []
        if first[i].stop < second[k].stop:
            i += 1
        else:
            k += 1
    return found
