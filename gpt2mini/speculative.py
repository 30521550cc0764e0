"""Speculative decoding: the model checks several drafted tokens in one forward pass.

A step of generation reads all weights to make one token. To read them for five tokens takes hardly
longer, if the five are known: a draft guesses them (drafts.py), the model computes the
distribution p after each, and a guess x that was drawn from q is accepted with the probability
min(1, p(x) / q(x)). In place of the first that is rejected a token is drawn from max(0, p - q),
scaled to a sum of 1; if none is, one more is drawn from p. So the text has exactly the model's
distribution, whatever the draft (Leviathan et al. 2023, "Fast Inference from Transformers via
Speculative Decoding", algorithm 1; Chen et al. 2023, "Accelerating Large Language Model Decoding
with Speculative Sampling"). At temperature 0 it is the text without a draft.

The rows of a batch advance together, by as many tokens as the one that accepts the fewest: so no
padding comes between the tokens of a row, whatever the model makes of distances between columns. A
token that is not taken for this reason is drafted anew, which changes no distribution.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from gpt2mini.drafts import Draft, Drafter, Drafting
from gpt2mini.reader import Reader
from gpt2mini.responses import NewTokens
from gpt2mini.sampling import check_logits
from gpt2mini.token_rules import TokenRules


@dataclass(frozen=True)
class Checked:
    """What the model makes of a draft. New tokens of a row: those that are accepted, and one."""

    accepted: Int[Tensor, " rows"]  # how many drafted tokens
    token_ids: Int[Tensor, "rows new"]  # those after `accepted` + 1 have no meaning
    logprobs: Float[Tensor, "rows new"]
    sampling_logprobs: Float[Tensor, "rows new"]

    def columns(self, n: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(token ids, logprobs, sampling_logprobs) of each of the first n new tokens."""
        columns = (self.token_ids.T, self.logprobs.T, self.sampling_logprobs.T)
        return zip(*(column[:n] for column in columns), strict=True)


def speculative_steps(
    reader: Reader,
    drafter: Drafter,
    text: Int[Tensor, "rows prompt"],
    is_real: Bool[Tensor, "rows prompt"],
    rules: TokenRules,
    max_new_tokens: int,
    stops: Int[Tensor, " stops"],
    drafting: Drafting,
) -> Iterator[NewTokens]:
    """The loop behind `generate(..., draft=...)`: draft, check, feed back."""
    active = torch.ones(len(text), dtype=torch.bool, device=text.device)
    tokens_left = max_new_tokens
    while tokens_left:
        most = min(drafting.draft_tokens, tokens_left - 1, reader.room(is_real))
        draft = no_draft(text, reader)
        if most > 0 and reader.cache is not None:
            draft = drafter.draft(text, is_real, most)
        start, drafted = text.shape[1], draft.token_ids.shape[1]
        text = torch.cat([text, draft.token_ids], dim=1)  # (rows, start + drafted)
        is_real = F.pad(is_real, (0, drafted), value=True)
        logits = reader.read(text, is_real, 1 + drafted)  # (rows, new, vocab)
        allowed = apply_rules(draft, logits, text, is_real, rules, active, tokens_left)
        has_ended = F.pad(torch.isin(draft.token_ids, stops).cumsum(dim=1) > 0, (1, 0))
        has_ended = has_ended | ~active[:, None]  # (rows, new)
        allowed = allowed.masked_fill(has_ended[..., None], 0)  # as in `plain_steps`
        checked = check_draft(draft, logits, allowed, rules, active)
        kept = int(checked.accepted[active].min())  # columns of the draft
        drafting.counts.drafted += int(draft.is_drafted[active].sum())
        drafting.counts.accepted += kept * int(active.sum())
        text, is_real = text[:, :start], F.pad(is_real[:, :start], (0, kept + 1), value=True)
        for ids, logprobs, sampling_logprobs in checked.columns(kept + 1):
            chosen = torch.where(active, ids, text[:, -1])  # (rows)
            text = torch.cat([text, chosen[:, None]], dim=1)
            yield NewTokens(chosen, active, logprobs, sampling_logprobs)
            if rules.states is not None:
                rules.states.read(chosen, active)
            active = active & ~torch.isin(chosen, stops)
            if len(stops) and not active.any():
                return
        tokens_left -= kept + 1
        drafter.advance(drafted, kept)
        assert reader.cache is not None
        reader.cache.forget(drafted - kept)


def no_draft(text: Int[Tensor, "rows tokens"], reader: Reader) -> Draft:
    """At the start, and where the context has no room: a step without a draft."""
    rows, vocab = len(text), reader.model.config.vocab_size
    none = torch.zeros(rows, 0, dtype=torch.bool, device=text.device)
    return Draft(text[:, :0], none, torch.zeros(rows, 0, vocab, device=text.device))


def apply_rules(
    draft: Draft,
    logits: Float[Tensor, "rows new vocab"],
    text: Int[Tensor, "rows tokens"],
    is_real: Bool[Tensor, "rows tokens"],
    rules: TokenRules,
    active: Bool[Tensor, " rows"],
    tokens_left: int,
) -> Float[Tensor, "rows new vocab"]:
    """The logits after each drafted token, each by the rules for the text up to there. tokens_left:
    how many may follow the text before the draft."""
    drafted = draft.token_ids.shape[1]
    start = text.shape[1] - drafted
    before = None if rules.states is None else rules.states.current
    allowed = []
    for i in range(drafted + 1):
        end, left = start + i, tokens_left - i - 1
        allowed.append(rules.apply(logits[:, i], text[:, :end], is_real[:, :end], left))
        if rules.states is not None and i < drafted:
            rules.states.read(draft.token_ids[:, i], active)
    if rules.states is not None and before is not None:
        rules.states.current = before
    return torch.stack(allowed, dim=1)


def check_draft(
    draft: Draft,
    logits: Float[Tensor, "rows new vocab"],
    allowed: Float[Tensor, "rows new vocab"],
    rules: TokenRules,
    active: Bool[Tensor, " rows"],
) -> Checked:
    """Accept the drafted tokens as far as the model would have drawn them, and draw one more for
    each row. allowed: the model's logits after all rules."""
    p = rules.probabilities(allowed)  # (rows, new, vocab)
    q = draft.probabilities * draft.is_drafted[..., None]  # (rows, drafted, vocab)
    drafted, guessed = draft.token_ids.shape[1], draft.token_ids[..., None].long()
    p_of_guess = p[:, :drafted].gather(2, guessed)[..., 0]  # (rows, drafted)
    q_of_guess = q.gather(2, guessed)[..., 0]  # (rows, drafted)
    uniform = rules.uniform_like(q_of_guess)
    is_accepted = draft.is_drafted & (uniform * q_of_guess < p_of_guess)
    accepted = is_accepted.long().cumprod(dim=1).sum(dim=1)  # (rows)

    rows = torch.arange(len(p), device=p.device)
    check_logits(allowed[rows, accepted])
    # After the last drafted token q is 0: then the token is drawn from p.
    left = (p - F.pad(q, (0, 0, 0, 1))).clamp(min=0)[rows, accepted]  # (rows, vocab)
    left = torch.where(left.sum(dim=1, keepdim=True) > 0, left, p[rows, accepted])
    following = rules.draw_from(left).to(draft.token_ids.dtype)  # (rows)
    token_ids = F.pad(draft.token_ids, (0, 1)).scatter(1, accepted[:, None], following[:, None])
    new = token_ids[..., None].long()
    return Checked(
        accepted,
        token_ids,
        logits.log_softmax(dim=2).gather(2, new)[..., 0],
        p.log().gather(2, new)[..., 0],
    )
