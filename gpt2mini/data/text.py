"""Token ids -> batches for next-token training: shuffled ones to train on, windows to score.

Rows of `Batch` are texts or windows of them. What is learned at each position is its label, which
is the token id itself: the loss shifts labels by one.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from gpt2mini.data.batching import ShuffledBatches
from gpt2mini.masking import IGNORED, pad_right

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Padded texts. `attention_mask` None: no row is padded."""

    token_ids: Int[Tensor, "batch tokens"]
    labels: Int[Tensor, "batch tokens"]  # token ids, or IGNORED
    attention_mask: Int[Tensor, "batch tokens"] | None = None

    def to(self, device: torch.device) -> "Batch":
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return Batch(self.token_ids.to(device), self.labels.to(device), mask)


class TokenBatches(ShuffledBatches):
    """Shuffled batches of consecutive tokens; iterating over them is one epoch.

    Each epoch concatenates the documents in a new order, cuts the result into windows of
    `context_length` tokens, and draws the windows in a random order: no two batches of an epoch
    share a token, and the rows of a batch come from different places.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        documents: list[range],
        batch_size: int,
        context_length: int,
        seed: int,
    ) -> None:
        super().__init__(batch_size, seed)
        self.tokens = tokens
        kept = [document for document in documents if len(document)]
        self.stops = np.array([document.stop for document in kept], np.int64)  # (documents)
        self.lengths = np.array([len(document) for document in kept], np.int64)  # (documents)
        self.total = int(self.lengths.sum())
        if self.total < 2:
            raise ValueError("the text is too short to train on: it has fewer than two tokens")
        check_context_length(context_length)
        self.context_length = min(context_length, self.total)
        self.n_windows = self.total // self.context_length
        if batch_size > self.n_windows:
            logger.warning(
                "a batch of %d x %d tokens repeats some of the %d training tokens",
                *(batch_size, self.context_length, self.total),
            )

    def __len__(self) -> int:
        return max(1, self.n_windows // self.batch_size)

    def epoch(self, generator: np.random.Generator, first: int, every: int) -> Iterator[Batch]:
        order = generator.permutation(len(self.lengths))
        ends = np.cumsum(self.lengths[order])  # (documents), in the concatenation
        length = self.context_length
        offset = int(generator.integers(self.total - self.n_windows * length + 1))
        windows = np.resize(generator.permutation(self.n_windows), len(self) * self.batch_size)
        for batch in windows.reshape(-1, self.batch_size)[first::every].tolist():
            rows = [self.read(order, ends, offset + window * length) for window in batch]
            token_ids = torch.from_numpy(np.stack(rows).astype(np.int64))  # (batch, tokens)
            yield Batch(token_ids, token_ids)

    def read(self, order: np.ndarray, ends: np.ndarray, start: int) -> np.ndarray:
        """`context_length` tokens from `start` of the concatenation of the shuffled documents."""
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
    """Batches for validation: every token but a document's first is predicted exactly once, by
    windows that overlap by one token. The last rows are padded."""
    texts = [tokens[document.start : document.stop] for document in documents]
    rows = sliding_windows(texts, context_length, stride=context_length - 1)
    for first in range(0, len(rows), batch_size):
        yield pad_windows(rows[first : first + batch_size])


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a text. The first `n_context` of them are context and not scored."""

    token_ids: Int[Tensor, " tokens"] | Integer[np.ndarray, " tokens"]
    n_context: int

    @property
    def n_scored(self) -> int:
        return len(self.token_ids) - self.n_context


def sliding_windows(
    texts: Sequence[Tensor] | Sequence[np.ndarray], context_length: int, stride: int
) -> list[Window]:
    """Windows over each text that together score every token but the first exactly once; longest
    first, so that only the last rows need padding.

    stride: how far the window moves each time, at least 1. Where windows do not overlap (a stride
    of at least `context_length`), the first token of each has no context and is not scored.
    Raises ValueError for a stride or context_length too small.
    """
    check_context_length(context_length)
    if stride < 1:
        raise ValueError(f"stride must be at least 1, not {stride}: the window has to move")
    overlap = max(1, context_length - stride)  # a token is predicted from at least one before it
    found = []
    for ids in texts:
        starts = [0, *range(stride, len(ids) - overlap, stride)] if len(ids) > 1 else []
        for start in starts:
            found.append(Window(ids[start : start + context_length], overlap if start else 1))
    return sorted(found, key=lambda window: -len(window.token_ids))


def check_context_length(context_length: int) -> None:
    """Raise ValueError for windows too short to predict a token."""
    if context_length < 2:
        raise ValueError(
            f"context_length must be at least 2, not {context_length}: a token is predicted from "
            "those before it"
        )


def pad_windows(rows: Sequence[Window]) -> Batch:
    """Right-pad windows to the longest; context and padding are IGNORED in the labels."""
    batch = pad_batch([torch.from_numpy(np.asarray(row.token_ids, np.int64)) for row in rows])
    column = torch.arange(batch.labels.shape[1])  # (tokens)
    is_context = column < torch.tensor([[row.n_context] for row in rows])  # (batch, tokens)
    labels = batch.labels.masked_fill(is_context, IGNORED)
    return Batch(batch.token_ids, labels, batch.attention_mask)


def pad_batch(rows: list[Tensor]) -> Batch:
    """Right-pad rows of token ids to the longest; mask and labels come from the lengths."""
    token_ids, is_real = pad_right(rows)  # (batch, tokens), both
    if is_real.all():
        return Batch(token_ids, token_ids)
    return Batch(token_ids, token_ids.masked_fill(~is_real, IGNORED), is_real.long())
