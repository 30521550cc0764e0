"""Perplexity of a text, in the three normalisations that people compare.

Per token it depends on the vocabulary, so it compares models of one tokenizer only. Per word and
per byte it does not: there the same text has the same length for every model.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gpt2mini.data.text import Batch, pad_batch
from gpt2mini.losses import IGNORED
from gpt2mini.model import GPT2
from gpt2mini.tokenizer import Tokenizer
from gpt2mini.training.loop import evaluate_loss


@dataclass(frozen=True)
class Perplexity:
    """The surprise of a model at a text: nats in all, and what to divide them by."""

    nats: float
    tokens: int
    words: int
    bytes: int

    @property
    def per_token(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def per_word(self) -> float:
        """Words are what white space separates."""
        return math.exp(self.nats / self.words)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


def perplexity(
    model: GPT2,
    tokenizer: Tokenizer,
    text: str,
    context_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> Perplexity:
    """Score every token of a text once; the first is predicted from <|endoftext|>.

    context_length: tokens that the model sees at once; the default is all it can. stride: how far
    the window moves each time; the default is half of the context, so that a token has at least the
    other half before it. The result does not depend on the batch size.
    """
    if not text:
        raise ValueError("the text is empty: there is nothing to score")
    context_length = context_length or model.config.context_length
    stride = stride or max(1, context_length // 2)
    if not 1 <= stride <= context_length <= model.config.context_length:
        raise ValueError(
            f"expected 1 <= stride ({stride}) <= context_length ({context_length}) "
            f"<= the model's {model.config.context_length}"
        )
    ids = [tokenizer.eos_id, *tokenizer.encode(text)]
    batches = windows(torch.tensor(ids), context_length, stride, batch_size)
    mean = evaluate_loss(model, batches)
    tokens = len(ids) - 1
    return Perplexity(mean * tokens, tokens, max(1, len(text.split())), len(text.encode()))


def windows(
    ids: torch.Tensor, context_length: int, stride: int, batch_size: int
) -> Iterator[Batch]:
    """Overlapping windows in batches; labels keep only what no earlier window has scored."""
    rows: list[torch.Tensor] = []
    fresh: list[int] = []  # where in each row the targets begin that were not scored before
    scored = 1  # the first token, <|endoftext|>, is no target
    for start in range(0, len(ids), stride):
        end = min(start + context_length, len(ids))
        if scored < end:
            rows.append(ids[start:end])
            fresh.append(scored - start)
            scored = end
        if rows and (len(rows) == batch_size or scored == len(ids)):
            batch = pad_batch(rows)
            column = torch.arange(batch.labels.shape[1])  # (tokens)
            is_old = column < torch.tensor(fresh)[:, None]  # (batch, tokens)
            labels = batch.labels.masked_fill(is_old, IGNORED)
            yield Batch(batch.token_ids, labels, batch.attention_mask)
            rows, fresh = [], []
        if scored == len(ids):
            return
