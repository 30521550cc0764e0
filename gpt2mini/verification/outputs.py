"""Facts about what a model computes: greedy continuations, logits, bits per byte of a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gpt2mini.evaluation import perplexity
from gpt2mini.generation import generate
from gpt2mini.masking import pad_left
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating
from gpt2mini.tokenizer import Tokenizer
from gpt2mini.verification.facts import Fact, Figure, Installation


@dataclass(frozen=True, kw_only=True)
class GreedyTexts(Fact):
    """Prompts and their greedy continuations, which are the expected texts.

    Several prompts are one batch, padded on the left. margin: of a fact that was measured, how far
    the second token stayed behind the first, in logits, where it came nearest.
    """

    prompts: list[str]
    new_tokens: int
    margin: float | None = None

    @property
    def title(self) -> str:
        return f"greedy: {', '.join(quoted(prompt, 30) for prompt in self.prompts)}"

    def find(self, installation: Installation) -> list[str]:
        model, tokenizer = installation.model, installation.tokenizer
        rows = greedy_ids(model, tokenizer, self.prompts, self.new_tokens)
        return [tokenizer.decode(ids) for ids in rows]

    @property
    def expected_text(self) -> str:
        return quoted(self.expected[0], 18)

    def found_text(self, found: list[str]) -> str:
        return quoted(found[0], 18)

    def difference(self, found: list[str]) -> str:
        pairs = zip(self.expected, found, strict=True)
        return "; ".join(f"expected {a!r}, found {b!r}" for a, b in pairs if a != b)


def quoted(text: str, length: int) -> str:
    """The beginning of a text in quotation marks, so many characters in all."""
    shown = repr(text)
    return shown if len(shown) <= length else f"{shown[: length - 4]}...{shown[-1]}"


def greedy_ids(
    model: GPT2, tokenizer: Tokenizer, prompts: Sequence[str], new_tokens: int
) -> list[list[int]]:
    """The tokens that follow each prompt, of one batch."""
    if not prompts:
        return []
    token_ids, mask = pad_left([torch.tensor(tokenizer.encode(prompt)) for prompt in prompts])
    out = generate(model, token_ids, new_tokens, attention_mask=mask, temperature=0.0)
    rows: list[list[int]] = out.token_ids[:, -new_tokens:].tolist()
    return rows


@dataclass(frozen=True, kw_only=True)
class Logits(Fact):
    """Logits of some tokens at some positions of a text: expected are rows of position, token id
    and logit."""

    text: str
    tolerance: float

    @property
    def title(self) -> str:
        return f"logits of {quoted(self.text, 22)}"

    def find(self, installation: Installation) -> list[list[Any]]:
        logits = logits_of(installation.model, installation.tokenizer.encode(self.text))
        return [
            [position, token, float(logits[position, token])]
            if position < logits.shape[0] and token < logits.shape[1]
            else [position, token, float("nan")]
            for position, token, _ in self.expected
        ]

    def agrees(self, found: list[list[Any]]) -> bool:
        return self.largest_difference(found) <= self.tolerance

    def largest_difference(self, found: list[list[Any]]) -> float:
        pairs = zip(self.expected, found, strict=True)
        return float(torch.tensor([abs(b[2] - a[2]) for a, b in pairs]).max())  # NaN stays NaN

    @property
    def expected_text(self) -> str:
        return f"{len(self.expected)} ± {self.tolerance:g}"

    def found_text(self, found: list[list[Any]]) -> str:
        return f"within {self.largest_difference(found):.1g}"


def logits_of(model: GPT2, ids: list[int]) -> Float[Tensor, "tokens vocab"]:
    """Logits at the tokens of a text, as many as the context holds."""
    token_ids = torch.tensor([ids[: model.config.context_length]])
    with evaluating(model):
        return model(token_ids.to(model.tok_emb.weight.device))[0].float().cpu()


@dataclass(frozen=True, kw_only=True)
class BitsPerByte(Figure):
    """Of a text that the fact itself holds."""

    text: str

    @property
    def title(self) -> str:
        return f"bits per byte of {len(self.text):,} characters"

    def find(self, installation: Installation) -> float:
        return perplexity(installation.model, installation.tokenizer, self.text).bits_per_byte
