"""What generation returns: the new tokens of each row, step by step and all together."""

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
        logprobs=torch.cat([prompt, of_active([s.logprobs for s in steps], new_active)], dim=1),
        sampling_logprobs=torch.cat(
            [prompt, of_active([s.sampling_logprobs for s in steps], new_active)], dim=1
        ),
        drafts=drafts,
    )


def of_active(
    steps: list[Float[Tensor, " rows"]], active: Bool[Tensor, "rows new"]
) -> Float[Tensor, "rows new"]:
    """The values of the steps side by side, 0 where a row had ended (where they may be -inf)."""
    return torch.stack(steps, dim=1).masked_fill(~active, 0)
