"""What the explorer's page should show: what Python computes with the weights that the page holds,
and numbers as the page writes them."""

import re
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from gpt2mini import GPT2, Tokenizer
from gpt2mini.inspection import logit_lens, patched, trace
from gpt2mini.inspection.tracing import Patch

TEXT = "The old keeper lit the lamp. Then the old keeper"
HARD_TEXT = "The </script><b>lamp</b> &amp; \u4e2d it"  # for HTML, and with a Chinese character


class InPython:
    """What torch computes for a text with the weights of a page."""

    def __init__(self, model: GPT2, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.trace = cache(self._trace)

    def ids(self, text: str) -> Tensor:
        return torch.tensor([self.tokenizer.encode(text)])  # (1, tokens)

    def labels(self, text: str) -> list[str]:
        return [self.label(i) for i in self.tokenizer.encode(text)]

    def label(self, token_id: int) -> str:
        token = self.tokenizer.token_bytes(token_id)  # may be a part of a character
        text = token.decode("utf-8", "backslashreplace")
        return text.replace(" ", "\u2423").replace("\n", "\u23ce")

    def id(self, token: str) -> int:
        [only] = self.tokenizer.encode(token)
        return only

    def _trace(self, text: str) -> dict[str, Tensor]:
        return trace(self.model, self.ids(text)).activations

    def probabilities(
        self, text: str, position: int = -1, patches: Mapping[str, Patch] | None = None
    ) -> Tensor:
        """Of each token of the vocabulary as the next one: (vocab)."""
        with patched(self.model, patches or {}):
            logits = trace(self.model, self.ids(text), names=["logits"])["logits"]
        return logits[0, position].softmax(dim=0)

    def likeliest(self, probabilities: Tensor, n: int) -> list[tuple[str, float]]:
        best = probabilities.topk(n)
        labels = map(self.label, best.indices.tolist())
        return list(zip(labels, best.values.tolist(), strict=True))

    def lens(self, text: str, layer: int, position: int = -1) -> tuple[str, float]:
        """What the model would say after so many blocks."""
        found = logit_lens(self.model, self.ids(text), k=1)
        token_id = found.token_ids[layer, 0, position, 0]
        return self.label(int(token_id)), float(found.probabilities[layer, 0, position, 0])


# ---- numbers as the page writes them


def percents(text: str) -> list[float]:
    """The percentages in a text, as shares of 1; "<0.01 %" as 0."""
    found = re.findall(r"(<?)([\d.]+)[\s\u00a0]%", text)
    return [0.0 if less else float(digits) / 100 for less, digits in found]


def shows(text: str, *shares: float | Tensor) -> bool:
    """Whether a text has exactly these shares, in percent, as far as it writes them out."""
    found = percents(text)
    return len(found) == len(shares) and all(
        abs(seen - float(p)) < (0.0011 if p >= 0.0995 else 0.00011)
        for seen, p in zip(found, shares, strict=True)
    )
