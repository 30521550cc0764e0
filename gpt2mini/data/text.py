"""Token ids -> batches for next-token training: shuffled ones to train on, windows to score.

Rows of `Batch` are texts or windows of them. What is learned at each position is its label, which
is the token id itself: the loss shifts labels by one.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from gpt2mini.masking import IGNORED, pad_right

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Texts side by side. `attention_mask` None: all tokens are real."""

    token_ids: Int[Tensor, "batch tokens"]
    labels: Int[Tensor, "batch tokens"]  # token ids, or IGNORED
    attention_mask: Int[Tensor, "batch tokens"] | None = None

    def to(self, device: torch.device) -> "Batch":
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return Batch(self.token_ids.to(device), self.labels.to(device), mask)


class TokenBatches:
    """Endless shuffled batches of consecutive tokens, a function of (seed, batch number) alone.

    Each epoch lays the documents end to end in a new order, cuts that line into windows of
    `context_length` tokens, and draws the windows in a random order: no two batches of an epoch
    share a token, and the rows of a batch come from different places. `part` begins later, which
    is how a run resumes, or takes every n-th batch, which is how processes share the work.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        documents: list[range],
        batch_size: int,
        context_length: int,
        seed: int,
    ) -> None:
        self.tokens = tokens
        kept = [document for document in documents if len(document)]
        self.stops = np.array([document.stop for document in kept], np.int64)  # (documents)
        self.lengths = np.array([len(document) for document in kept], np.int64)  # (documents)
        self.batch_size, self.context_length = batch_size, context_length
        self.seed, self.start, self.every = seed, 0, 1
        self.total = int(self.lengths.sum())
        if self.total < 2:
            raise ValueError("the text is too short to learn from: it has fewer than two tokens")
        check_predicts(context_length)
        self.context_length = min(context_length, self.total)
        self.windows = self.total // self.context_length
        self.batches_per_epoch = max(1, self.windows // batch_size)
        if batch_size > self.windows:
            logger.warning(
                "a batch of %d x %d tokens reads the %d tokens to learn from more than once",
                *(batch_size, self.context_length, self.total),
            )

    def part(self, start: int, every: int = 1) -> "TokenBatches":
        """The batches from number `start` on, every `every`-th of them; no other is read."""
        found = copy(self)
        found.start, found.every = start, every
        return found

    def __iter__(self) -> Iterator[Batch]:
        number = self.start
        while True:
            epoch, first = divmod(number, self.batches_per_epoch)
            generator = np.random.default_rng((self.seed, epoch))
            order = generator.permutation(len(self.lengths))
            ends = np.cumsum(self.lengths[order])  # (documents): where each ends on the line
            length = self.context_length
            offset = int(generator.integers(self.total - self.windows * length + 1))
            windows = np.resize(
                generator.permutation(self.windows), self.batches_per_epoch * self.batch_size
            )
            for batch in windows.reshape(-1, self.batch_size)[first :: self.every].tolist():
                rows = [
                    self.read(order, ends, offset + window * self.context_length)
                    for window in batch
                ]
                token_ids = torch.from_numpy(np.stack(rows).astype(np.int64))  # (batch, tokens)
                yield Batch(token_ids, token_ids)
                number += self.every

    def read(self, order: np.ndarray, ends: np.ndarray, start: int) -> np.ndarray:
        """`context_length` tokens from `start` on the line of documents in their shuffled order."""
        place = int(np.searchsorted(ends, start, side="right"))
        parts, missing = [], self.context_length
        while missing:
            left = int(ends[place]) - start  # of this document
            first = int(self.stops[order[place]]) - left
            part = self.tokens[first : first + min(left, missing)]
            parts.append(part)
            missing, start, place = missing - len(part), start + len(part), place + 1
        return np.concatenate(parts)


def sequential_batches(
    tokens: np.ndarray, documents: Iterable[range], batch_size: int, context_length: int
) -> Iterator[Batch]:
    """Every token of the documents once and in order, for validation: windows overlap by one token,
    so that each token but a document's first is predicted exactly once. The last rows are
    padded."""
    texts = [tokens[document.start : document.stop] for document in documents]
    rows = windows(texts, context_length, stride=context_length - 1)
    for first in range(0, len(rows), batch_size):
        yield as_batch(rows[first : first + batch_size])


@dataclass(frozen=True)
class Window:
    """A stretch of a text. Its first `seen` tokens are context only."""

    token_ids: Int[Tensor, " tokens"] | Integer[np.ndarray, " tokens"]
    seen: int


def windows(
    texts: Sequence[Tensor] | Sequence[np.ndarray], context_length: int, stride: int
) -> list[Window]:
    """Windows in which every token but the first of each text is new once, longest first, so that
    only the last rows need padding."""
    check_predicts(context_length)
    if stride < 1:
        raise ValueError(f"stride must be at least 1, not {stride}: windows have to move on")
    overlap = max(1, context_length - stride)  # with no token before it, none can be predicted
    found = []
    for ids in texts:
        starts = [0, *range(stride, len(ids) - overlap, stride)] if len(ids) > 1 else []
        for start in starts:
            found.append(Window(ids[start : start + context_length], overlap if start else 1))
    return sorted(found, key=lambda window: -len(window.token_ids))


def check_predicts(context_length: int) -> None:
    """Raises ValueError for windows in which nothing can be predicted."""
    if context_length < 2:
        raise ValueError(
            f"a window of {context_length} tokens predicts nothing, for a token is predicted from "
            "those before it: take at least 2"
        )


def as_batch(rows: Sequence[Window]) -> Batch:
    """Windows side by side; the labels keep what is new in each."""
    batch = pad_batch([torch.from_numpy(np.asarray(row.token_ids, np.int64)) for row in rows])
    column = torch.arange(batch.labels.shape[1])  # (tokens)
    is_seen = column < torch.tensor([row.seen for row in rows])[:, None]  # (batch, tokens)
    return Batch(batch.token_ids, batch.labels.masked_fill(is_seen, IGNORED), batch.attention_mask)


def pad_batch(rows: list[Tensor]) -> Batch:
    """Right-pad rows of token ids to the longest; mask and labels come from the lengths."""
    token_ids, is_real = pad_right(rows)  # (batch, tokens), both
    if is_real.all():
        return Batch(token_ids, token_ids)
    return Batch(token_ids, token_ids.masked_fill(~is_real, IGNORED), is_real.long())
