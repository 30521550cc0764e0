"""Attention mask, positions and segment ids: what padding and packing mean.

Texts of different lengths share a batch by padding the short ones. Three things keep padding from
changing the result. Masks come from lengths and never from token ids, so a padding id that is also
<|endoftext|> is harmless. Positions count real tokens only, because GPT-2 learned one vector for
each absolute position. And every token may at least attend to itself, so that no softmax is over an
empty set.

Short texts can also be packed into one row. A mask of segment ids, 1 1 1 2 2 3 3 3 0, keeps them
apart: each attends to itself alone and counts its positions from 0.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

if TYPE_CHECKING:
    from gpt2mini.cache import KeyValueCache

IGNORED = -100  # a label that is left out of the loss: padding, or a prompt


def segment_ids(
    like: Tensor, attention_mask: Tensor | None, cache: "KeyValueCache | None"
) -> Int[Tensor, "batch total"] | None:
    """The segment of each cached and each new token, 0 for padding; None: one text in each row.

    like: a tensor of the shape (batch, tokens) of the new tokens.
    """
    earlier = None if cache is None else cache.segment_ids  # (batch, past)
    if attention_mask is None and earlier is None:
        return None
    batch, tokens = like.shape
    past = 0 if cache is None else cache.length
    if attention_mask is None:
        new = torch.ones_like(like, dtype=torch.long)  # (batch, tokens)
    else:
        new = attention_mask[:, -tokens:].long()  # (batch, tokens)
    if earlier is None:
        earlier = new.new_ones(batch, past)
    return torch.cat([earlier, new], dim=1)  # (batch, total)


def build_attn_mask(
    like: Tensor, segments: Tensor | None, past: int
) -> Bool[Tensor, "_ 1 tokens total"] | None:
    """True where a new token (row) may attend to a token (column): of its segment, not after it.

    None stands for the plain causal pattern, which attention kernels know without a mask.
    """
    tokens = like.shape[1]
    if segments is None and (past == 0 or tokens == 1):
        return None
    if segments is None:
        segments = torch.ones(1, past + tokens, dtype=torch.long, device=like.device)
    columns = torch.arange(past + tokens, device=like.device)  # (total)
    causal = columns <= columns[-tokens:, None]  # (tokens, total)
    # Padding is a segment of its own, number 0, to which no other token attends.
    same_segment = segments[:, -tokens:, None] == segments[:, None, :]  # (batch, tokens, total)
    return (same_segment & causal)[:, None]


def count_positions(
    like: Tensor, segments: Tensor | None, attn_mask: Tensor | None, past: int
) -> Int[Tensor, "_ tokens"]:
    """Position of each new token: the number of tokens of its own segment before it, which are
    those that it may attend to."""
    tokens = like.shape[1]
    if segments is None or attn_mask is None:
        return torch.arange(past, past + tokens, device=like.device)[None]  # (1, tokens)
    visible = attn_mask[:, 0].sum(dim=2)  # (batch, tokens), itself included
    return torch.where(segments[:, -tokens:] > 0, visible - 1, 0)  # (batch, tokens)


def pad_right(
    rows: Sequence[Shaped[Tensor, "_ *rest"]],
) -> tuple[Shaped[Tensor, "batch tokens *rest"], Bool[Tensor, "batch tokens"]]:
    """Stack rows, padded with zeros to the longest; and a mask of the real tokens, from the
    lengths."""
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


def pad_left(
    rows: Sequence[Shaped[Tensor, "_ *rest"]],
) -> tuple[Shaped[Tensor, "batch tokens *rest"], Bool[Tensor, "batch tokens"]]:
    """The same, with the zeros before the rows, which then all end in the last column."""
    padded, is_real = pad_right([row.flip(0) for row in rows])
    return padded.flip(1), is_real.flip(1)


def align_right(
    token_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"],
) -> tuple[Int[Tensor, "batch tokens"], Shaped[Tensor, "batch tokens"]]:
    """Move the padding behind the last real token of each row to the front of the row, so that
    every text ends in the last column, as `last_only` needs it."""
    columns = torch.arange(token_ids.shape[1], device=token_ids.device)  # (tokens)
    last = (columns * attention_mask.bool()).argmax(dim=1, keepdim=True)  # (batch, 1)
    order = (columns + last + 1) % token_ids.shape[1]  # (batch, tokens)
    return token_ids.gather(1, order), attention_mask.gather(1, order)


def last_token(
    x: Shaped[Tensor, "batch tokens *rest"],
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None,
) -> Shaped[Tensor, "batch *rest"]:
    """The entry of x at the last real token of each row.

    The mask tells which it is, on whichever side the padding stands. Without a mask it is the last
    token; a row of padding alone gives its first.
    """
    if attention_mask is None:
        return x[:, -1]
    places = torch.arange(x.shape[1], device=x.device)  # (tokens)
    last = (places * attention_mask.bool()).argmax(dim=1)  # (batch)
    return x[torch.arange(len(x), device=x.device), last]
