"""Texts to batches: encode, and group texts of similar length so that little is padded."""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gpt2mini.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BATCH_TOKENS = 4096  # padding counted, where no gradient is asked for


def encode_texts(
    texts: Sequence[str], tokenizer: Tokenizer, longest: int, keep: str = "head"
) -> list[Tensor]:
    """Token ids of each text, at most `longest` of them: its head or its tail, with a notice.

    A text without tokens becomes <|endoftext|>, so that there is something to read.
    """
    if isinstance(texts, str):
        raise ValueError("expected a list of texts, not one text: put it in brackets, [text]")
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
    """Indices in the order of length, longest first, cut so that no batch has more tokens."""
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
    """Shuffled batches of texts of similar length, so that little is padded: a list of indices
    for each.

    Texts are shuffled, cut into stretches of some dozens of batches, sorted by length inside a
    stretch, and the batches shuffled: nearly as random as without, with a tenth of the padding.
    Raises ValueError if there is none.
    """
    if not len(lengths):
        raise ValueError("there is nothing to learn from: the data hold no text")
    order = generator.permutation(len(lengths))
    stretch = 32 * batch_size
    batches = []
    for start in range(0, len(order), stretch):
        inside = sorted(order[start : start + stretch].tolist(), key=lambda i: lengths[i])
        batches += [inside[i : i + batch_size] for i in range(0, len(inside), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]
