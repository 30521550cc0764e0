"""Perplexity of a text: per token, per word, and in bits per byte.

Per token it depends on the vocabulary, so it compares only models that share a tokenizer. The
number of words and bytes is the same for every model.

A text longer than the context is cut into windows, see `gpt2mini.evaluation.windows`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from gpt2mini.checks import check_predicts_tokens
from gpt2mini.device import autocast
from gpt2mini.evaluation.windows import (
    check_window,
    states_and_targets,
    text_windows,
    window_batches,
)
from gpt2mini.losses.chunked import summed_cross_entropy
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating
from gpt2mini.tokenizer import Tokenizer


@dataclass(frozen=True)
class Perplexity:
    """The negative log-likelihood of a text in nats, and the counts to divide it by.

    A first token that is not scored counts in `nats` with the mean of the others, so that words and
    bytes are those of the whole text. `scored`: the number of tokens scored.
    """

    nats: float
    tokens: int
    words: int
    bytes: int
    scored: int

    @staticmethod
    def of(mean: float, texts: Sequence[str], tokens: int, scored: int) -> "Perplexity":
        """From the mean loss of the tokens scored."""
        return Perplexity(
            nats=mean * tokens,
            tokens=tokens,
            words=max(1, sum(len(text.split()) for text in texts)),
            bytes=sum(len(text.encode("utf-8", errors="replace")) for text in texts),
            scored=scored,
        )

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def per_token(self) -> float:
        return exponential(self.loss)

    @property
    def per_word(self) -> float:
        """Words are separated by white space."""
        return exponential(self.nats / self.words)

    @property
    def bits_per_byte(self) -> float:
        """Bytes of UTF-8."""
        return self.nats / math.log(2) / self.bytes

    def __str__(self) -> str:
        return (
            f"{self.per_token:.2f} per token, {self.per_word:.2f} per word, "
            f"{self.bits_per_byte:.3f} bits per byte "
            f"({self.tokens:,} tokens, {self.words:,} words, {self.bytes:,} bytes)"
        )


def perplexity(
    model: GPT2,
    tokenizer: Tokenizer,
    text: str | Sequence[str],
    context_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    score_first: bool = True,
    precision: str = "fp32",
    progress: bool = False,
) -> Perplexity:
    """Score every token of a text, or of several independent texts, once.

    context_length: length of the window in tokens; the default is the model's context. stride:
    None for rolling windows, as lm-eval's; a number for sliding windows that move by so many
    tokens, as in the documentation of transformers (see `gpt2mini.evaluation.windows`). A sliding
    window whose stride is its length does not score its first token, which has no context.
    score_first: the first token of a text is predicted from <|endoftext|>, which GPT-2 saw between
    documents; False leaves it out, as `transformers` does. precision: "fp32", "bf16", or "auto"
    for bf16 where the device gains from it, which moves the figure by some thousandths. The result
    does not depend on the batch size.

    Raises ValueError for an empty text, one of a single token, a stride beyond the context, or a
    classifier.
    """
    check_predicts_tokens(model)
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("there is no text to score")
    context_length = check_window(model, context_length, stride)
    encoded = [encode(tokenizer, one, number) for number, one in enumerate(texts, start=1)]
    prefix = torch.tensor([tokenizer.eos_id] if score_first else [], dtype=torch.long)
    rows = text_windows([torch.cat([prefix, ids]) for ids in encoded], context_length, stride)
    device, nats = model.tok_emb.weight.device, 0.0
    batches = tqdm(window_batches(rows, batch_size), desc="perplexity", disable=not progress)
    with evaluating(model), autocast(device, precision):
        for batch in batches:
            nats += float(summed_cross_entropy(*states_and_targets(model, batch.to(device))))
    scored = sum(row.n_scored for row in rows)
    return Perplexity.of(nats / scored, texts, sum(map(len, encoded)), scored)


def encode(tokenizer: Tokenizer, text: str, number: int = 1) -> Int[Tensor, " tokens"]:
    """Token ids of a text of at least two tokens; `number`: which text, for the error message."""
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        found = "is empty" if not ids else f"has one token only ({text!r})"
        raise ValueError(f"text {number} {found}: perplexity needs at least two tokens")
    return torch.tensor(ids)


def exponential(x: float) -> float:
    """e to the x; infinity where that overflows."""
    return math.inf if x >= 700 else math.exp(x)  # in this order: of NaN it is NaN
