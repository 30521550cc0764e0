"""Logits -> next token: each rule is a small function of (rows, vocab) logits; `Sampling` applies
them.

A rule that forbids a token sets its logit to minus infinity, which softmax turns into probability
0.
"""

import numbers
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FORBIDDEN = float("-inf")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The rules apply in the order in which they stand here."""

    repetition_penalty: float = 1.0  # above 1: tokens already in the text become less likely
    no_repeat_ngram_size: int = 0  # n above 0: no n tokens in a row appear twice
    temperature: float = 1.0  # below 1: sharper; above 1: flatter; 0: the most likely (greedy)
    top_k: int | None = None  # choose among the k most likely; 0: among all
    top_p: float | None = None  # choose among the fewest whose probabilities add up to p; 1: all

    def __post_init__(self) -> None:
        for name in ("repetition_penalty", "temperature", "top_p"):
            check_number(name, getattr(self, name), optional=name == "top_p")
        for name in ("no_repeat_ngram_size", "top_k"):
            whole = whole_number(name, getattr(self, name), optional=name == "top_k")
            object.__setattr__(self, name, whole)  # 50.0 becomes 50
        for name, holds, rule in (
            ("repetition_penalty", lambda x: x > 0, "must be above 0 (1 changes nothing)"),
            ("no_repeat_ngram_size", lambda n: n >= 0, "must be 0 (off) or more"),
            ("temperature", lambda x: 0 <= x < float("inf"), "must be 0 (greedy) or more"),
            ("top_k", lambda k: k is None or k >= 0, "must be 0 (off) or more"),
            ("top_p", lambda p: p is None or 0 < p <= 1, "must lie in (0, 1] (1 is off)"),
        ):
            value = getattr(self, name)
            if not holds(value):
                raise ValueError(f"{name} {rule}, not {value}")

    def apply(
        self,
        logits: Float[Tensor, "rows vocab"],
        token_ids: Int[Tensor, "rows tokens"],
        is_real: Bool[Tensor, "rows tokens"],
    ) -> Float[Tensor, "rows vocab"]:
        """The logits of the next token after all rules, given the text so far."""
        if self.repetition_penalty != 1.0:
            logits = penalize_repetition(logits, token_ids, is_real, self.repetition_penalty)
        if self.no_repeat_ngram_size:
            logits = forbid_repeated_ngrams(logits, token_ids, is_real, self.no_repeat_ngram_size)
        if self.temperature > 0:
            logits = divide_by_temperature(logits, self.temperature)
        if self.top_k:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        return logits


def check_number(name: str, value: Any, optional: bool = False) -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number or (optional and value is None)):
        raise TypeError(f"{name} must be a number, not {value!r}; without it, the default holds")


def whole_number(name: str, value: Any, optional: bool = False) -> Any:
    """The value as an int, or None. Raises TypeError for what is no number, ValueError for a part
    of one."""
    check_number(name, value, optional)
    if value is None:
        return None
    if value != value // 1:
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    return int(value)


def penalize_repetition(
    logits: Float[Tensor, "rows vocab"],
    token_ids: Int[Tensor, "rows tokens"],
    is_real: Bool[Tensor, "rows tokens"],
    penalty: float,
) -> Float[Tensor, "rows vocab"]:
    """Make every token that the row already contains less likely (Keskar et al. 2019, CTRL, section
    4.1)."""
    seen = tokens_seen(token_ids, is_real, vocab_size=logits.shape[1])  # (rows, vocab)
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def tokens_seen(
    token_ids: Int[Tensor, "rows tokens"], is_real: Bool[Tensor, "rows tokens"], vocab_size: int
) -> Bool[Tensor, "rows vocab"]:
    counts = torch.zeros(len(token_ids), vocab_size, dtype=torch.int32, device=token_ids.device)
    return counts.scatter_add_(1, token_ids, is_real.int()) > 0


def forbid_repeated_ngrams(
    logits: Float[Tensor, "rows vocab"],
    token_ids: Int[Tensor, "rows tokens"],
    is_real: Bool[Tensor, "rows tokens"],
    size: int,
) -> Float[Tensor, "rows vocab"]:
    """Forbid every token that would complete an n-gram that the row already contains."""
    logits = logits.clone()
    for row, (ids, real) in enumerate(zip(token_ids, is_real, strict=True)):
        text = ids[real]  # (tokens of this row)
        if len(text) < size:
            continue
        ngrams = text.unfold(0, size, 1)  # (n-grams, size)
        ending = text[len(text) - size + 1 :]  # (size - 1): what the next token would extend
        logits[row, ngrams[(ngrams[:, :-1] == ending).all(dim=1), -1]] = FORBIDDEN
    return logits


def divide_by_temperature(
    logits: Float[Tensor, "rows vocab"], temperature: float
) -> Float[Tensor, "rows vocab"]:
    """Below 1 sharpens the distribution, above 1 flattens it; toward 0 it becomes greedy."""
    if temperature < 1e-6:  # logits / temperature could overflow; from 0 down they become -inf
        lowest = torch.finfo(logits.dtype).min  # where all are forbidden, they stay so
        logits = logits - logits.amax(dim=1, keepdim=True).clamp(min=lowest)
        temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    return logits / temperature


def keep_top_k(logits: Float[Tensor, "rows vocab"], k: int) -> Float[Tensor, "rows vocab"]:
    """Keep the k most likely tokens (Fan et al. 2018)."""
    smallest_kept = logits.topk(min(k, logits.shape[1])).values[:, -1:]  # (rows, 1)
    return logits.masked_fill(logits < smallest_kept, FORBIDDEN)


def keep_top_p(logits: Float[Tensor, "rows vocab"], p: float) -> Float[Tensor, "rows vocab"]:
    """Keep the fewest tokens whose probabilities add up to p (nucleus, Holtzman et al. 2020)."""
    if p >= 1:
        return logits  # the sum below, rounded, can reach 1 before the last tokens
    in_order, token_of = logits.sort(dim=1, descending=True)
    probabilities = in_order.softmax(dim=1)
    before = probabilities.cumsum(dim=1) - probabilities  # the sum over more likely tokens
    in_order = in_order.masked_fill(before >= p, FORBIDDEN)
    return torch.empty_like(logits).scatter_(1, token_of, in_order)


def draw(
    logits: Float[Tensor, "rows vocab"], temperature: float, generator: torch.Generator | None
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """(token ids, their log-probabilities under the distribution drawn from). Temperature 0: the
    argmax."""
    check_logits(logits)
    if temperature == 0:
        token_ids = logits.argmax(dim=1)
        return token_ids, torch.zeros_like(logits[:, 0])
    token_ids = sample_from(logits.softmax(dim=1), generator)  # (rows)
    return token_ids, logits.log_softmax(dim=1).gather(1, token_ids[:, None])[:, 0]


def probabilities(
    logits: Float[Tensor, "*rows vocab"], temperature: float
) -> Float[Tensor, "*rows vocab"]:
    """What `draw` draws from, given logits after all rules. Temperature 0: all on the argmax."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    return logits.softmax(dim=-1)


def sample_from(
    probabilities: Float[Tensor, "rows vocab"], generator: torch.Generator | None
) -> Int[Tensor, " rows"]:
    """A token of each row; the numbers of a row need not sum to 1."""
    if probabilities.device.type == "cpu":
        return sample_by_inverse_cdf(probabilities, generator)[:, 0]
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def check_logits(logits: Float[Tensor, "rows vocab"]) -> None:
    """Raise ValueError for logits of which none could be chosen."""
    best = logits.amax(dim=1)  # (rows); NaN where any is NaN
    if best.isfinite().all():
        return
    if (best == FORBIDDEN).any():
        raise ValueError(
            "no token is left to choose, every logit is -inf: with no_repeat_ngram_size every "
            "token would repeat an n-gram, or forbidden_ids or valid_utf8 forbid the rest, or the "
            "model's own logits are so"
        )
    raise ValueError("the logits contain NaN or infinity: check the model's weights and inputs")


def sample_by_inverse_cdf(
    probabilities: Float[Tensor, "rows vocab"], generator: torch.Generator | None
) -> Int[Tensor, "rows 1"]:
    """Inverse transform sampling: the first token whose cumulative probability exceeds a uniform
    random number.

    `torch.multinomial` draws a random number for each token of the vocabulary, which on a CPU takes
    a seventh of a step of GPT-2 124M. (Not for GPUs: their parallel sums may give a token of
    probability 0 an interval.)
    """
    ends = probabilities.cumsum(dim=1, dtype=torch.float64)  # (rows, vocab)
    point = torch.rand(len(ends), 1, dtype=torch.float64, generator=generator) * ends[:, -1:]
    return torch.searchsorted(ends, point, right=True)  # right: past tokens of probability 0
