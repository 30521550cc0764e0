"""What generation returns: the new tokens of each row, step by step and all together."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class DraftCounts:
    """In speculative decoding: how many tokens were drafted, and how many of them accepted."""

    drafted: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        """The share that was accepted; 0 if none was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass(frozen=True)
class Generated:
    """What `generate` returns. All tensors have one shape, (rows, prompt + new): column for
    column."""

    token_ids: Int[Tensor, "rows tokens"]  # a finished row repeats its last token
    attention_mask: Bool[Tensor, "rows tokens"]  # real tokens: the prompt's and the response's
    response_mask: Bool[Tensor, "rows tokens"]  # generated tokens, the stop token included
    logprobs: Float[Tensor, "rows tokens"]  # of the response tokens under the model itself; else 0
    sampling_logprobs: Float[Tensor, "rows tokens"]  # the same after temperature, top-k and so on
    drafts: DraftCounts = field(default_factory=DraftCounts)  # of speculative decoding


@dataclass(frozen=True)
class NewTokens:
    """One new token for every row. Rows that have ended are not active; their values are
    padding."""

    token_ids: Int[Tensor, " rows"]
    active: Bool[Tensor, " rows"]
    logprobs: Float[Tensor, " rows"]
    sampling_logprobs: Float[Tensor, " rows"]


def joined(
    token_ids: Int[Tensor, "rows prompt"],
    attention_mask: Tensor | None,
    steps: list[NewTokens],
    drafts: DraftCounts,
) -> Generated:
    """The prompt and all steps behind it."""
    prompt = torch.zeros(token_ids.shape, device=token_ids.device)  # (rows, prompt)
    new_active = torch.stack([step.active for step in steps], dim=1)  # (rows, new)
    prompt_real = torch.ones_like(prompt) if attention_mask is None else attention_mask
    return Generated(
        token_ids=torch.cat([token_ids, *(step.token_ids[:, None] for step in steps)], dim=1),
        attention_mask=torch.cat([prompt_real.bool(), new_active], dim=1),
        response_mask=torch.cat([prompt.bool(), new_active], dim=1),
        logprobs=torch.cat([prompt, *(step.logprobs[:, None] for step in steps)], dim=1),
        sampling_logprobs=torch.cat(
            [prompt, *(step.sampling_logprobs[:, None] for step in steps)], dim=1
        ),
        drafts=drafts,
    )


class Responses:
    """The responses of rows that grow at different speeds, as in speculative decoding."""

    def __init__(
        self, prompt: Int[Tensor, "rows tokens"], max_new_tokens: int, stops: Int[Tensor, " ids"]
    ) -> None:
        rows, device = len(prompt), prompt.device
        self.token_ids = prompt[:, -1:].repeat(1, max_new_tokens)  # (rows, new)
        self.logprobs = torch.zeros(rows, max_new_tokens, device=device)
        self.sampling_logprobs = torch.zeros(rows, max_new_tokens, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.active = torch.ones(rows, dtype=torch.bool, device=device)
        self.max_new_tokens, self.stops = max_new_tokens, stops
        self.given = 0  # steps that `new_steps` has given

    @property
    def missing(self) -> Int[Tensor, " rows"]:
        """How many tokens each row may still get."""
        return torch.where(self.active, self.max_new_tokens - self.lengths, 0)

    def add(
        self,
        token_ids: Int[Tensor, "rows tokens"],
        logprobs: Float[Tensor, "rows more"],
        sampling_logprobs: Float[Tensor, "rows more"],
    ) -> None:
        """Append to each active row its tokens, up to a stop token or to the most that are
        wanted. The log-probabilities may have more columns than are used."""
        columns = torch.arange(token_ids.shape[1], device=token_ids.device)  # (tokens)
        is_stop = torch.isin(token_ids, self.stops)  # (rows, tokens)
        after_stop = is_stop.cumsum(dim=1) - is_stop.long() > 0  # (rows, tokens)
        is_new = (columns < self.missing[:, None]) & ~after_stop  # (rows, tokens)
        row, column = is_new.nonzero(as_tuple=True)
        place = self.lengths[row] + column
        self.token_ids[row, place] = token_ids[row, column]
        self.logprobs[row, place] = logprobs[row, column]
        self.sampling_logprobs[row, place] = sampling_logprobs[row, column]
        self.lengths = self.lengths + is_new.sum(dim=1)
        self.active = self.active & ~(is_stop & is_new).any(dim=1) & (self.missing > 0)

    def new_steps(self) -> Iterator[NewTokens]:
        """The steps that every active row has reached since the last call; at the end, all."""
        reached = self.lengths[self.active] if self.active.any() else self.lengths
        end = int(reached.min() if self.active.any() else reached.max())
        last = self.token_ids.gather(1, (self.lengths - 1).clamp(min=0)[:, None])[:, 0]  # (rows)
        for i in range(self.given, end):
            active = i < self.lengths  # (rows)
            token_ids = torch.where(active, self.token_ids[:, i], last)
            yield NewTokens(token_ids, active, self.logprobs[:, i], self.sampling_logprobs[:, i])
        self.given = max(self.given, end)
