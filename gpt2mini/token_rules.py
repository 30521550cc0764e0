"""Which token may come next: all rules of a request together."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gpt2mini.sampling import FORBIDDEN, Sampling, draw, probabilities, sample_from
from gpt2mini.valid_utf8 import TextStates


@dataclass
class TokenRules:
    """forbidden: ids that never come. states: of the texts, if broken characters are forbidden."""

    sampling: Sampling
    forbidden: Int[Tensor, " ids"]
    generator: torch.Generator | None
    states: TextStates | None = None

    def apply(
        self,
        logits: Float[Tensor, "rows vocab"],
        text: Int[Tensor, "rows tokens"],
        is_real: Bool[Tensor, "rows tokens"],
        tokens_left: int = 0,
    ) -> Float[Tensor, "rows vocab"]:
        """The logits of the token after a text, of which `tokens_left` more may follow."""
        allowed = logits.index_fill(1, self.forbidden, FORBIDDEN)  # (rows, vocab)
        if self.states is not None:
            allowed = self.states.forbid_broken(allowed, tokens_left)
        return self.sampling.apply(allowed, text, is_real)

    def draw(
        self, logits: Float[Tensor, "rows vocab"]
    ) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
        """(next token of each row, its log-probability), from logits to which the rules were
        applied."""
        return draw(logits, self.sampling.temperature, self.generator)

    def probabilities(self, logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
        """The distribution that `draw` draws from."""
        return probabilities(logits, self.sampling.temperature)

    def draw_from(self, probabilities: Float[Tensor, "rows vocab"]) -> Int[Tensor, " rows"]:
        """A token of each row. At temperature 0, where one has them all, no number is drawn."""
        if self.sampling.temperature == 0:
            return probabilities.argmax(dim=1)
        return sample_from(probabilities, self.generator)

    def uniform_like(self, x: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        """Random numbers of 0 to 1; at temperature 0, where any will do, none are drawn."""
        if self.sampling.temperature == 0:
            return torch.full_like(x, 0.5)
        return torch.rand(x.shape, generator=self.generator, device=x.device)
