"""Encode texts, and group texts of similar length into batches with little padding: shuffled ones
for training, an epoch each time they are iterated over."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2mini.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BATCH_TOKENS = 4096  # with padding; for batches without gradients


def encode_texts(
    texts: Sequence[str], tokenizer: Tokenizer, longest: int, keep: str = "head"
) -> list[Tensor]:
    """Token ids of each text, cut to the first or last `longest` tokens, with a warning.

    An empty text becomes <|endoftext|>. keep: "head" or "tail".
    """
    if isinstance(texts, str):
        raise ValueError("expected a list of texts, not one text: use [text]")
    if longest < 1:
        raise ValueError(f"longest must be at least 1 token, not {longest}")
    if keep not in ("head", "tail"):
        raise ValueError(f"keep must be 'head' or 'tail', not {keep!r}")
    rows, cut = [], 0
    for text in texts:
        ids = tokenizer.encode(text) or [tokenizer.eos_id]
        cut += len(ids) > longest
        rows.append(torch.tensor(ids[:longest] if keep == "head" else ids[-longest:]))
    if cut:
        message = "%d of %d texts were longer than %d tokens: their %s was kept"
        logger.warning(message, cut, len(rows), longest, keep)
    return rows


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices sorted by length, longest first, in batches of at most `batch_tokens` padded tokens
    (or of one text)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def length_buckets(
    lengths: Sequence[int], batch_size: int, generator: np.random.Generator
) -> list[list[int]]:
    """Shuffled batches of texts of similar length, as lists of indices.

    Texts are shuffled and divided into buckets of 32 batches; each bucket is sorted by length and
    cut into batches, and all batches are shuffled: nearly as random as without buckets, with a
    tenth of the padding.
    """
    order = generator.permutation(len(lengths))
    bucket = 32 * batch_size
    batches = []
    for start in range(0, len(order), bucket):
        ordered = sorted(order[start : start + bucket].tolist(), key=lambda i: lengths[i])
        batches += [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


class ShuffledBatches(ABC):
    """Training batches. Iterating over them is one epoch, and `len` counts its batches.

    The first iteration gives epoch 0, the next one epoch 1, each in an order of its own that is a
    function of the seed and the epoch alone:

        for epoch in range(3):
            for batch in batches: ...
    """

    def __init__(self, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.batch_size, self.seed = batch_size, seed
        self.next_epoch = 0

    @abstractmethod
    def __len__(self) -> int:
        """Batches in an epoch."""

    @abstractmethod
    def epoch(self, generator: np.random.Generator, first: int, every: int) -> Iterator[Any]:
        """Every `every`-th batch of an epoch from number `first` on."""

    def __iter__(self) -> Iterator[Any]:
        first = self.next_epoch * len(self)
        self.next_epoch += 1
        return islice(self.part(first), len(self))

    def part(self, first: int = 0, every: int = 1) -> Iterator[Any]:
        """Every `every`-th batch from number `first` on, counted through all epochs, without end.

        `training.train` starts or resumes a run with it, and gives each rank its share.
        """
        number = first
        while True:
            epoch, place = divmod(number, len(self))
            for batch in self.epoch(np.random.default_rng((self.seed, epoch)), place, every):
                yield batch
                number += every


class LengthBatches(ShuffledBatches):
    """Shuffled batches of items of similar length. Raises ValueError if there is no item."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        super().__init__(batch_size, seed)
        self.lengths = list(lengths)
        if not self.lengths:
            raise ValueError("there is nothing to learn from: the data have no text")

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> Any:
        """Some of the items side by side."""

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def epoch(self, generator: np.random.Generator, first: int, every: int) -> Iterator[Any]:
        for indices in length_buckets(self.lengths, self.batch_size, generator)[first::every]:
            yield self.batch(indices)
