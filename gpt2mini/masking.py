"""The padding contract: which tokens are real, where they stand, and who may look at whom.

Texts of different lengths share a batch by padding the short ones. Three things keep padding from
changing anything. Masks come from lengths and never from token ids, so a padding id that is also
<|endoftext|> does no harm. Positions count real tokens only, because GPT-2 learned one vector for
each absolute position. And every token may at least attend to itself, so that no softmax is over
nothing.

Short texts can also share a row. A mask that numbers them, 1 1 1 2 2 3 3 3 0, keeps them apart:
each sees itself alone, from position 0, as if its neighbors were not there.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

if TYPE_CHECKING:
    from gpt2mini.cache import KeyValueCache

IGNORED = -100  # a label that asks for nothing: padding, or a prompt that is only read


def segment_ids(
    token_ids: Tensor, attention_mask: Tensor | None, cache: "KeyValueCache | None"
) -> Int[Tensor, "batch total"] | None:
    """Which text each cached and each new token belongs to, 0 for padding; None: one text a row."""
    earlier = None if cache is None else cache.segment_ids  # (batch, past)
    if attention_mask is None and earlier is None:
        return None
    batch, tokens = token_ids.shape
    past = 0 if cache is None else cache.length
    if attention_mask is None:
        new = torch.ones_like(token_ids, dtype=torch.long)  # (batch, tokens)
    else:
        new = attention_mask[:, -tokens:].long()  # (batch, tokens)
    if earlier is None:
        earlier = new.new_ones(batch, past)
    return torch.cat([earlier, new], dim=1)  # (batch, total)


def count_positions(
    token_ids: Tensor, segments: Tensor | None, attn_mask: Tensor | None, past: int
) -> Int[Tensor, "_ tokens"]:
    """Position of each new token: the number of earlier tokens of its own segment, which are those
    that it may attend to."""
    tokens = token_ids.shape[1]
    if segments is None or attn_mask is None:
        return torch.arange(past, past + tokens, device=token_ids.device)[None]  # (1, tokens)
    visible = attn_mask[:, 0].sum(dim=2)  # (batch, tokens), itself included
    return torch.where(segments[:, -tokens:] > 0, visible - 1, 0)  # (batch, tokens)


def build_attn_mask(
    token_ids: Tensor, numbers: Tensor | None, past: int
) -> Bool[Tensor, "_ 1 tokens total"] | None:
    """True where a new token (row) may attend to a token (column): of its text, and not after it.

    None stands for the plain causal pattern, which attention kernels know without a mask.
    """
    tokens = token_ids.shape[1]
    if numbers is not None:
        return same_segment_and_causal(numbers, tokens)[:, None]  # (batch, 1, tokens, total)
    if past == 0 or tokens == 1:
        return None
    one_text = torch.ones(1, past + tokens, dtype=torch.long, device=token_ids.device)
    return same_segment_and_causal(one_text, tokens)[:, None]  # (1, 1, tokens, total)


def same_segment_and_causal(numbers: Tensor, tokens: int) -> Bool[Tensor, "_ tokens total"]:
    """Which tokens (columns) are of the same text as each of the last `tokens` (rows), up to it.

    Padding counts as a text of its own, number 0, which nobody else looks at.
    """
    columns = torch.arange(numbers.shape[1], device=numbers.device)  # (total)
    rows = columns[-tokens:, None]  # (tokens, 1)
    return (numbers[:, -tokens:, None] == numbers[:, None, :]) & (columns <= rows)


def pad_right(
    rows: Sequence[Shaped[Tensor, "_ *rest"]],
) -> tuple[Shaped[Tensor, "batch tokens *rest"], Bool[Tensor, "batch tokens"]]:
    """Rows side by side, filled up with zeros to the longest; and which places are real, from the
    lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


def last_token(
    x: Shaped[Tensor, "batch tokens *rest"],
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None,
) -> Shaped[Tensor, "batch *rest"]:
    """What stands at the last real token of each row, the one that has seen the whole text.

    Where the mask says it is, on whichever side the padding stands; the ids are not looked at.
    Without a mask it is the last token; a row of nothing but padding gives its first.
    """
    if attention_mask is None:
        return x[:, -1]
    places = torch.arange(x.shape[1], device=x.device)  # (tokens)
    last = (places * attention_mask.bool()).argmax(dim=1)  # (batch)
    return x[torch.arange(len(x), device=x.device), last]
