"""Plain text -> a memory-mapped file of token ids -> shuffled batches for next-token training.

A corpus may be larger than memory. It is read in pieces, tokenised by all cores at once, and
written to disk as it goes; training then maps that file, so that the operating system holds in
memory only the parts in use.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from gpt2mini.losses import IGNORED
from gpt2mini.padding import pad_right
from gpt2mini.tokenizer import END_OF_TEXT, Tokenizer

logger = logging.getLogger(__name__)

PIECE_CHARACTERS = 8192  # a few pages: what a thread tokenises at a time; the unit of `fraction`
READ_CHARACTERS = 2**22
# What \s means in GPT-2's word pattern (Unicode's White_Space; Python's isspace has four more).
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


@dataclass(frozen=True)
class Batch:
    """Texts side by side. `attention_mask` None: all tokens are real."""

    token_ids: Int[Tensor, "batch tokens"]
    labels: Int[Tensor, "batch tokens"]  # token ids, or IGNORED
    attention_mask: Int[Tensor, "batch tokens"] | None = None

    def to(self, device: torch.device) -> "Batch":
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return Batch(self.token_ids.to(device), self.labels.to(device), mask)


def text_files(path: str | Path) -> list[Path]:
    """The file itself, or all .txt files in and below a folder, in order of their names."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a text file nor a folder of text files")
    files = sorted(path.rglob("*.txt"))
    if not files:
        raise ValueError(f"{path} holds no .txt file")
    return files


def read_pieces(path: Path) -> Iterator[tuple[str, bool]]:
    """(text, whether a document ends here): a file in pieces of about PIECE_CHARACTERS.

    A document is a file, or what stands between <|endoftext|> marks in it. Pieces are cut before
    white space, where GPT-2's word pattern always starts a new word, so that the ids are those of
    the whole.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rest = ""
        try:
            while block := file.read(READ_CHARACTERS):
                *documents, rest = (rest + block).split(END_OF_TEXT)
                for document in documents:
                    pieces = list(cut(document))
                    yield from ((piece, False) for piece in pieces[:-1])
                    yield from ((piece, True) for piece in pieces[-1:])
                *pieces, rest = cut(rest) or [""]
                while pieces and len(rest) < len(END_OF_TEXT):  # it may begin with half a mark
                    rest = pieces.pop() + rest
                yield from ((piece, False) for piece in pieces)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None
        if rest:
            yield rest, True


def cut(text: str) -> list[str]:
    """Pieces of at most PIECE_CHARACTERS, split before white space where there is any in reach."""
    pieces, start = [], 0
    while len(text) - start > PIECE_CHARACTERS:
        end = start + PIECE_CHARACTERS
        middle = start + PIECE_CHARACTERS // 2
        best = text.rfind("\n", middle, end)
        if best < 0:
            best = text.rfind(" ", middle, end)
        while best > start and text[best - 1] in WHITE_SPACE:
            best -= 1  # to where the run of white space begins
        if best > start:
            end = best
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]] if text[start:] else pieces


class TokenFile:
    """Token ids of a corpus on disk, mapped into memory, with the bounds of its pieces and
    documents."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")  # (tokens), uint16 or uint32
        pieces = np.load(folder / "pieces.npy")
        self.bounds = pieces["end"]  # (pieces): where each piece ends in `tokens`
        self.ends_document = pieces["ends_document"]  # (pieces)

    def documents(self, fraction: float = 1.0, seed: int = 0) -> list[range]:
        """Token ranges of the documents; with a `fraction`, of a seeded share of all pieces
        instead."""
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
    """Tokenise text files into `folder`, once: the same files and vocabulary are found done the
    next time.

    Every document ends in <|endoftext|>. All cores work at once (tiktoken lets go of Python's
    lock).
    """
    folder = Path(folder) / corpus_key(files, tokenizer)
    if (folder / "pieces.npy").is_file():  # written last
        return TokenFile(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    pieces: list[tuple[int, bool]] = []
    total = 0
    size = sum(file.stat().st_size for file in files)
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", disable=not progress)
    raw = folder / f"tokens.{os.getpid()}.partial"
    with raw.open("wb") as output, bar:
        for text, ids, ends_document in tokenize_pieces(files, tokenizer):
            output.write(ids.astype(dtype).tobytes())
            if ends_document:
                output.write(np.array([tokenizer.eos_id], dtype).tobytes())
            total += len(ids) + ends_document
            pieces.append((total, ends_document))
            bar.update(len(text.encode("utf-8", errors="replace")))
    if not total:
        raw.unlink()
        raise ValueError(f"there is no text in {', '.join(map(str, files[:3]))}")
    write_npy(folder / "tokens.npy", np.memmap(raw, dtype, mode="r"))
    raw.unlink()
    write_npy(
        folder / "pieces.npy",
        np.array(pieces, dtype=[("end", np.int64), ("ends_document", np.bool_)]),
    )
    logger.info("%d tokens in %d pieces written to %s", total, len(pieces), folder)
    return TokenFile(folder)


def tokenize_pieces(
    files: list[Path], tokenizer: Tokenizer
) -> Iterator[tuple[str, np.ndarray, bool]]:
    """(text, ids, whether a document ends here), in order; a bounded number of pieces is under
    way."""
    pieces = ((text, ends) for file in files for text, ends in read_pieces(file))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while group := list(islice(pieces, 256)):
            ids = pool.map(tokenizer.encode_to_numpy, (text for text, _ in group))
            yield from ((text, i, ends) for (text, ends), i in zip(group, ids, strict=True))


def corpus_key(files: list[Path], tokenizer: Tokenizer) -> str:
    """A name that changes with the vocabulary and with any file's name, size or date."""
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    described = json.dumps([facts, tokenizer.merges, tokenizer.vocab, PIECE_CHARACTERS])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def write_npy(path: Path, array: np.ndarray) -> None:
    """Write aside, then rename: the file is whole or not there."""
    aside = path.with_name(f"{path.stem}.{os.getpid()}.npy")
    np.save(aside, array)
    aside.replace(path)


def hold_out(documents: list[range], share: float, seed: int) -> tuple[list[range], list[range]]:
    """(training, validation): whole documents, seeded, where there are enough of them to choose
    from; otherwise the last part of each document."""
    if len(documents) >= 20:
        order = np.random.default_rng(seed).permutation(len(documents))
        count = max(1, round(share * len(documents)))
        validation = set(order[:count].tolist())
        return (
            [document for i, document in enumerate(documents) if i not in validation],
            [document for i, document in enumerate(documents) if i in validation],
        )
    cuts = [document.start + int(len(document) * (1 - share)) for document in documents]
    return (
        [range(document.start, cut) for document, cut in zip(documents, cuts, strict=True)],
        [range(cut, document.stop) for document, cut in zip(documents, cuts, strict=True)],
    )


class TokenBatches:
    """Endless shuffled batches of consecutive tokens, a function of (seed, batch number) alone.

    Each epoch lays the documents end to end in a new order, cuts that line into windows of
    `context_length` tokens, and draws the windows in a random order: no two batches of an epoch
    share a token, and the rows of a batch come from different places. `start` names the first
    batch, which is how a run resumes.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        documents: list[range],
        batch_size: int,
        context_length: int,
        seed: int,
        start: int = 0,
    ) -> None:
        self.tokens = tokens
        self.documents = [document for document in documents if len(document)]
        self.batch_size, self.context_length = batch_size, context_length
        self.seed, self.start = seed, start
        self.total = sum(map(len, self.documents))
        if self.total < 2:
            raise ValueError("the text is too short to learn from: it has fewer than two tokens")
        self.context_length = min(context_length, self.total)
        self.windows = self.total // self.context_length
        self.batches_per_epoch = max(1, self.windows // batch_size)

    def __iter__(self) -> Iterator[Batch]:
        number = self.start
        while True:
            epoch, first = divmod(number, self.batches_per_epoch)
            generator = np.random.default_rng((self.seed, epoch))
            order = generator.permutation(len(self.documents))
            ends = np.cumsum([len(self.documents[i]) for i in order])
            length = self.context_length
            offset = int(generator.integers(self.total - self.windows * length + 1))
            windows = np.resize(
                generator.permutation(self.windows), self.batches_per_epoch * self.batch_size
            )
            for batch in windows.reshape(-1, self.batch_size)[first:].tolist():
                rows = [
                    self.read(order, ends, offset + window * self.context_length)
                    for window in batch
                ]
                token_ids = torch.from_numpy(np.stack(rows).astype(np.int64))  # (batch, tokens)
                yield Batch(token_ids, token_ids)
                number += 1

    def read(self, order: np.ndarray, ends: np.ndarray, start: int) -> np.ndarray:
        """`context_length` tokens from `start` on the line of documents in their shuffled order."""
        place = int(np.searchsorted(ends, start, side="right"))
        parts, missing = [], self.context_length
        while missing:
            document = self.documents[order[place]]
            inside = start - (int(ends[place]) - len(document))
            part = self.tokens[
                document.start + inside : document.start + min(len(document), inside + missing)
            ]
            parts.append(part)
            missing, start, place = missing - len(part), start + len(part), place + 1
        return np.concatenate(parts)


def sequential_batches(
    tokens: np.ndarray, documents: Iterable[range], batch_size: int, context_length: int
) -> Iterator[Batch]:
    """Every token of the documents once and in order, for validation: windows overlap by one token,
    so that each token but a document's first is predicted exactly once. The last rows are
    padded."""
    starts = [(d, s) for d in documents for s in range(d.start, d.stop - 1, context_length - 1)]
    starts.sort(key=lambda pair: min(context_length, pair[0].stop - pair[1]), reverse=True)
    for first in range(0, len(starts), batch_size):
        rows = [
            tokens[s : min(s + context_length, d.stop)]
            for d, s in starts[first : first + batch_size]
        ]
        yield pad_batch([torch.from_numpy(row.astype(np.int64)) for row in rows])


def pad_batch(rows: list[Tensor]) -> Batch:
    """Right-pad rows of token ids to the longest; mask and labels come from the lengths."""
    token_ids, is_real = pad_right(rows)  # (batch, tokens), both
    if is_real.all():
        return Batch(token_ids, token_ids)
    return Batch(token_ids, token_ids.masked_fill(~is_real, IGNORED), is_real.long())
