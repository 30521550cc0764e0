"""Perplexity of a text: per token, per word, and in bits per byte.

Per token it depends on the vocabulary, so it compares only models that share a tokenizer. The
number of words and bytes is the same for every model.

A text longer than the context is scored with a sliding window:

    context_length 4, stride 2      the cat sat on
                                            sat on the mat          scored: the mat
                                                       the mat .    scored: .

Each token is scored once, by the first window that holds it. A shorter stride gives every token
more context, and costs more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from gpt2mini.checks import check_predicts_tokens
from gpt2mini.data.text import Window, pad_windows, sliding_windows
from gpt2mini.losses.steps import evaluate_loss
from gpt2mini.model import GPT2
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
    def of(
        mean: float, texts: Sequence[str], encoded: Sequence[Tensor], rows: Sequence[Window]
    ) -> "Perplexity":
        """From the mean loss of the tokens that the windows score."""
        tokens = sum(map(len, encoded))
        return Perplexity(
            nats=mean * tokens,
            tokens=tokens,
            words=max(1, sum(len(text.split()) for text in texts)),
            bytes=sum(len(text.encode("utf-8", errors="replace")) for text in texts),
            scored=sum(row.n_scored for row in rows),
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

    context_length: length of the window in tokens; the default is the model's context. stride: how
    far the window moves each time; the default is half of the window, so that a token has at least
    the other half as context. (Where the two are equal, the first token of a later window has no
    context and is not scored.) score_first: the first token of a text is predicted from
    <|endoftext|>, which GPT-2 saw between documents; False leaves it out, as `transformers` does.
    precision: "fp32", "bf16", or "auto" for bf16 where the device gains from it, which moves the
    figure by some thousandths. The result does not depend on the batch size.

    Raises ValueError for an empty text, one of a single token, a stride beyond the context, or a
    classifier.
    """
    check_predicts_tokens(model)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("there is no text to score")
    context_length, stride = window_and_stride(model, context_length, stride)
    encoded = [encode(tokenizer, one, number) for number, one in enumerate(texts, start=1)]
    prefix = torch.tensor([tokenizer.eos_id] if score_first else [], dtype=torch.long)
    rows = sliding_windows([torch.cat([prefix, ids]) for ids in encoded], context_length, stride)
    batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    bar = tqdm(batches, desc="perplexity", disable=not progress)
    mean = evaluate_loss(model, map(pad_windows, bar), precision=precision)
    return Perplexity.of(mean, texts, encoded, rows)


def window_and_stride(
    model: GPT2, context_length: int | None, stride: int | None
) -> tuple[int, int]:
    """(context_length, stride), each the default where it is None. Raises ValueError for values
    that the model cannot use."""
    longest = model.config.context_length
    context_length = longest if context_length is None else context_length
    stride = max(1, context_length // 2) if stride is None else stride
    if not 2 <= context_length <= longest or not 1 <= stride <= context_length:
        raise ValueError(
            f"expected 1 <= stride ({stride}) <= context_length ({context_length}), which lies in "
            f"2 to the model's {longest}"
        )
    return context_length, stride


def encode(tokenizer: Tokenizer, text: str, number: int = 1) -> Int[Tensor, " tokens"]:
    """Token ids of a text of at least two tokens; `number`: which text, for the error message."""
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        found = "is empty" if not ids else f"has one token only ({text!r})"
        raise ValueError(f"text {number} {found}: perplexity needs at least two tokens")
    return torch.tensor(ids)


def exponential(x: float) -> float:
    """e to the x; infinity where that overflows."""
    return math.exp(x) if x < 700 else math.inf
