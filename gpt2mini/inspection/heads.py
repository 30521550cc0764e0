"""Attention patterns of heads: three scores on a random sequence of tokens that is repeated.

    A7 K2 Q9 M4 A7 K2 Q9 M4          only the order of the tokens carries information

A **previous-token head** attends to the token before. An **induction head** attends to the token
that followed the current token at its earlier occurrence: at the second K2, to Q9. Together they
continue a repeated sequence, the simplest form of in-context learning (Elhage et al. 2021, "A
Mathematical Framework for Transformer Circuits"; Olsson et al. 2022, "In-context Learning and
Induction Heads", where the induction score is called prefix matching).

A **first-token head** attends to the first token of the text, whatever it is. The weights of a
query add up to 1, so a head with nothing to gather puts them where they do the least (Xiao et al.
2023, "Efficient Streaming Language Models with Attention Sinks").
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from gpt2mini.inspection.tracing import trace
from gpt2mini.model import GPT2


def previous_token_score(
    attention: Float[Tensor, "batch heads tokens tokens"],
) -> Float[Tensor, " heads"]:
    """mean over t >= 1 of attention[t, t - 1]: 1 if all attention is on the token before."""
    if attention.shape[2] < 2:
        raise ValueError(
            f"expected at least 2 tokens, not {attention.shape[2]}: the first has none before it"
        )
    return attention.diagonal(-1, dim1=2, dim2=3).mean(dim=(0, 2))


def induction_score(
    attention: Float[Tensor, "batch heads tokens tokens"], period: int
) -> Float[Tensor, " heads"]:
    """mean over t >= period of attention[t, t - period + 1], for tokens that repeat after `period`:
    1 if all attention is on the token that followed the earlier occurrence of the current one."""
    tokens = attention.shape[2]
    if not 2 <= period < tokens:
        raise ValueError(f"expected 2 <= period ({period}) < tokens ({tokens})")
    # The diagonal begins at row period - 1, whose token occurs for the first time: without it.
    return attention.diagonal(1 - period, dim1=2, dim2=3)[..., 1:].mean(dim=(0, 2))


def first_token_score(
    attention: Float[Tensor, "batch heads tokens tokens"],
) -> Float[Tensor, " heads"]:
    """mean over t >= 1 of attention[t, 0]: 1 if all attention is on the first token."""
    if attention.shape[2] < 2:
        raise ValueError(
            f"expected at least 2 tokens, not {attention.shape[2]}: the first attends to itself"
        )
    return attention[:, :, 1:, 0].mean(dim=(0, 2))


@dataclass(frozen=True)
class HeadScores:
    """Three scores of every head, from 0 to 1."""

    previous_token: Float[Tensor, "layers heads"]
    induction: Float[Tensor, "layers heads"]
    first_token: Float[Tensor, "layers heads"]

    def strongest(self, kind: str, n: int = 5) -> list[tuple[int, int, float]]:
        """(layer, head, score), the highest score first. kind: previous_token, induction or
        first_token."""
        kinds = [field.name for field in fields(self)]
        if kind not in kinds:
            raise ValueError(f"kind must be {', '.join(kinds[:-1])} or {kinds[-1]}, not {kind!r}")
        scores = getattr(self, kind)
        order = scores.flatten().argsort(descending=True)[:n].tolist()
        n_heads = scores.shape[1]
        return [(i // n_heads, i % n_heads, float(scores.flatten()[i])) for i in order]


def head_scores(model: GPT2, period: int = 32, batch_size: int = 4, seed: int = 0) -> HeadScores:
    """Three scores of every head on `batch_size` rows of `period` random tokens, repeated once."""
    longest = model.config.context_length // 2
    if not 2 <= period <= longest:
        raise ValueError(f"period must be from 2 to {longest}, half of the context, not {period}")
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(model.config.vocab_size, (batch_size, period), generator=generator)
    token_ids = once.repeat(1, 2).to(model.tok_emb.weight.device)  # (batch, 2 * period)
    layers = trace(model, token_ids, names=["blocks.*.attention"]).of_each_block("attention")
    return HeadScores(
        torch.stack([previous_token_score(attention) for attention in layers]).cpu(),
        torch.stack([induction_score(attention, period) for attention in layers]).cpu(),
        torch.stack([first_token_score(attention) for attention in layers]).cpu(),
    )
