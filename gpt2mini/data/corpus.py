"""Text files, or records of texts -> a memory-mapped file of token ids, and the documents in it.

A corpus may be larger than memory. It is read in pieces, tokenized by all cores at once, and
written to disk piece by piece; training then maps that file, so that the operating system keeps
only the parts in use in memory.
"""

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from gpt2mini.data import documents
from gpt2mini.data.documents import read_pieces, text_files
from gpt2mini.files import write_together
from gpt2mini.tokenizer import END_OF_TEXT, Tokenizer

__all__ = ["TokenFile", "hold_out", "read_pieces", "text_files", "tokenize_files"]

logger = logging.getLogger(__name__)

THREAD_CHARACTERS = 2**18  # in one task of a thread: much more work than starting the task
PIECE = np.dtype([("end", np.int64), ("ends_document", np.bool_)])  # a row of pieces.npy


class TokenFile:
    """Token ids of a corpus on disk, mapped into memory, with the bounds of its pieces and
    documents."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        mapped = np.load(folder / "tokens.npy", mmap_mode="r")
        self.tokens = np.asarray(mapped)  # (tokens), uint16 or uint32; mapped
        pieces = np.load(folder / "pieces.npy")
        self.bounds = pieces["end"]  # (pieces): where each piece ends in `tokens`
        self.ends_document = pieces["ends_document"]  # (pieces)

    def documents(self, fraction: float = 1.0, seed: int = 0) -> list[range]:
        """Token ranges of the documents; with a `fraction` below 1, of a seeded share of all
        pieces instead."""
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f"fraction must lie in (0, 1], not {fraction}")
        if fraction < 1.0:
            chosen = np.random.default_rng(seed).permutation(len(self.bounds))
            chosen = np.sort(chosen[: max(1, round(fraction * len(chosen)))])
            starts = np.concatenate([[0], self.bounds[:-1]])
            return [range(int(starts[i]), int(self.bounds[i])) for i in chosen]
        ends = [int(end) for end in self.bounds[self.ends_document]]
        return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def tokenize_files(
    files: list[Path], tokenizer: Tokenizer, folder: str | Path, progress: bool = True
) -> TokenFile:
    """Tokenize text files into `folder`, once: a second call with the same files and vocabulary
    opens what the first one wrote.

    Every document ends in <|endoftext|>. All cores work at once (tiktoken releases Python's lock).
    Raises ValueError for files without text, or in another encoding than `decoding` reads.
    """
    folder = Path(folder) / corpus_key(files, tokenizer)
    if not (folder / "pieces.npy").is_file():  # the last to be renamed into place
        folder.mkdir(parents=True, exist_ok=True)
        groups: list[np.ndarray] = []  # of pieces; known when all tokens are written
        write_together(
            {
                folder / "tokens.npy": lambda aside: groups.extend(
                    write_tokens(aside, files, tokenizer, progress)
                ),
                folder / "pieces.npy": lambda aside: write_array(aside, np.concatenate(groups)),
            }
        )
    return TokenFile(folder)


def write_tokens(
    path: Path, files: list[Path], tokenizer: Tokenizer, progress: bool
) -> list[np.ndarray]:
    """Write the token ids of all files as they come; return the pieces, with their ends."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    groups, total = [], 0
    size = sum(file.stat().st_size for file in files)
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="tokenizing", disable=not progress)
    with path.open("wb") as output, bar:
        write_header(output, dtype, 0)  # room for the one with the number of tokens
        for tokens, pieces, n_bytes in tokenize_pieces(files, tokenizer):
            output.write(tokens.astype(dtype).tobytes())
            pieces["end"] += total
            groups.append(pieces)
            total += len(tokens)
            bar.update(n_bytes)
        bar.update(size - bar.n)  # <|endoftext|> marks in the files are not counted as text
        output.seek(0)
        write_header(output, dtype, total)
    logger.info("%d tokens of %d files written to %s", total, len(files), path.parent)
    return groups


def tokenize_pieces(
    files: list[Path], tokenizer: Tokenizer
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """The results of `tokenize_group`, in the order of the files. Threads work a few groups ahead,
    so that none waits for the files to be read."""
    threads = os.cpu_count() or 1
    pending: deque[Future[tuple[np.ndarray, np.ndarray, int]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for group in read_groups(files):
            pending.append(pool.submit(tokenize_group, group, tokenizer))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def read_groups(files: list[Path]) -> Iterator[list[tuple[str, bool]]]:
    """The pieces of all files, in groups of at least THREAD_CHARACTERS. Raises ValueError if they
    are nothing but white space."""
    group, size, blank = [], 0, True
    for file in files:
        for piece in read_pieces(file):
            blank = blank and piece[0].isspace()
            group.append(piece)
            size += len(piece[0])
            if size >= THREAD_CHARACTERS:
                yield group
                group, size = [], 0
    if blank:
        raise ValueError(f"there is no text in {', '.join(map(str, files[:3]))}")
    if group:
        yield group


def tokenize_group(
    group: list[tuple[str, bool]], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, int]:
    """(token ids, the pieces with their ends counted from the first of these ids, bytes of text).

    Documents of one piece are encoded in one call, separated by <|endoftext|>, whose ids mark their
    ends: a call for each would spend most of its time waiting for Python's lock.
    """
    parts, ends, total = [], [], 0
    for text, last_ends_document in join_documents(group):
        ids = tokenizer.encode_to_numpy(text, allow_special=True)
        parts.append(ids)
        ends.append(total + 1 + np.flatnonzero(ids == tokenizer.vocab[END_OF_TEXT]))
        total += len(ids)
        if not last_ends_document:
            ends.append(np.array([total]))
    pieces = np.empty(len(group), PIECE)
    pieces["end"] = np.concatenate(ends)
    pieces["ends_document"] = [ends_document for _, ends_document in group]
    n_bytes = sum(len(text.encode()) for text, _ in group)
    return np.concatenate(parts), pieces, n_bytes


def join_documents(group: list[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """(text, whether a document ends with it): the pieces of a group joined, <|endoftext|> at the
    end of each document, up to each piece that does not end one."""
    joined: list[str] = []
    for text, ends_document in group:
        joined += [text, END_OF_TEXT] if ends_document else [text]
        if not ends_document:
            yield "".join(joined), False
            joined = []
    if joined:
        yield "".join(joined), True


def write_header(output: BinaryIO, dtype: np.dtype, n: int) -> None:
    """The header of a .npy file of n numbers; its length does not depend on n."""
    header = {"descr": dtype.str, "fortran_order": False, "shape": (n,)}
    np.lib.format.write_array_header_1_0(output, header)


def corpus_key(files: list[Path], tokenizer: Tokenizer) -> str:
    """A hash of the vocabulary and of every file's path, size and modification time."""
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    reading = [documents.PIECE_CHARACTERS, documents.READING]
    described = json.dumps([facts, tokenizer.settings.files, reading])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def write_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as output:  # given a path, np.save appends .npy to its name
        np.save(output, array)


def hold_out(documents: list[range], share: float, seed: int) -> tuple[list[range], list[range]]:
    """(training, validation): a seeded choice of whole documents where there are at least 20;
    otherwise the last part of each document. The share is one of the tokens: a document more than
    twice as long as what is to be held out is not.

    Raises ValueError for a share outside (0, 1), or a text too short for both to hold a target.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to hold out must lie between 0 and 1, as 0.1, not {share}")
    if len(documents) >= 20:
        chosen = set(choose_documents(list(map(len, documents)), share, seed))
        training = [document for i, document in enumerate(documents) if i not in chosen]
        validation = [document for i, document in enumerate(documents) if i in chosen]
    else:
        cuts = [document.start + int(len(document) * (1 - share)) for document in documents]
        parts = list(zip(documents, cuts, strict=True))
        training = [range(document.start, cut) for document, cut in parts]
        validation = [range(cut, document.stop) for document, cut in parts]
    n_training, longest = sum(map(len, training)), max(map(len, validation), default=0)
    if n_training < 2 or longest < 2:  # training concatenates documents; validation does not
        raise ValueError(
            f"the text is too short to hold out {share:g} of it: {n_training} tokens are left for "
            f"training, and the longest part held out has {longest}; each needs at least two: "
            "give more text or another share"
        )
    return training, validation


def choose_documents(lengths: list[int], share: float, seed: int) -> list[int]:
    """Numbers of documents in a seeded order, each where at least half of it is still missing of
    the share of all tokens; at least one, the shortest."""
    missing, chosen = share * sum(lengths), []
    for i in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        if lengths[i] / 2 <= missing:
            chosen.append(i)
            missing -= lengths[i]
    return chosen or [int(np.argmin(lengths))]
