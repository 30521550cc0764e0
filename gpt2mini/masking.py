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

from gpt2mini.config import GPT2Config

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
    config: GPT2Config,
    token_ids: Tensor,
    numbers: Tensor | None,
    attn_mask: Tensor | None,
    past: int,
) -> Int[Tensor, "_ tokens"]:
    """Position of each new token: how many tokens of its own text stand before it, which are those
    that it may attend to. Raises ValueError where a text is too long."""
    tokens = token_ids.shape[1]
    if numbers is None or attn_mask is None:
        check_length(config, past + tokens)  # without waiting for a GPU to tell the positions
        return torch.arange(past, past + tokens, device=token_ids.device)[None]  # (1, tokens)
    seen = attn_mask[:, 0].sum(dim=2)  # (batch, tokens), itself included
    positions = torch.where(numbers[:, -tokens:] > 0, seen - 1, 0)  # (batch, tokens)
    check_positions(config, positions)
    return positions


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


def check_input(
    config: GPT2Config,
    token_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: "KeyValueCache | None",
) -> None:
    """Raise ValueError for what would otherwise be a wrong result or a crash inside a kernel."""
    if not isinstance(token_ids, Tensor):
        raise TypeError(
            f"token_ids must be a tensor, not a {type(token_ids).__name__}: torch.tensor([ids])"
        )
    if token_ids.ndim != 2 or token_ids.numel() == 0:
        raise ValueError(
            f"token_ids must have the shape (batch, tokens) and hold at least one token, "
            f"not {tuple(token_ids.shape)}; for one text use torch.tensor([ids])"
        )
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"token_ids must be torch.long (or torch.int), not {token_ids.dtype}")
    batch, tokens = token_ids.shape
    past = 0 if cache is None else cache.length
    if cache is not None and len(cache.layers) != config.n_layers:
        raise ValueError(
            f"the cache is for {len(cache.layers)} blocks, the model has {config.n_layers}: "
            "make it with KeyValueCache(model.config, ...)"
        )
    if cache is not None and (batch != cache.batch_size or past + tokens > cache.max_tokens):
        raise ValueError(
            f"the cache is for {cache.batch_size} rows of at most {cache.max_tokens} tokens and "
            f"holds {past}; {batch} rows of {tokens} more do not fit: make a larger KeyValueCache"
        )
    if attention_mask is not None and tuple(attention_mask.shape) not in {
        (batch, tokens),
        (batch, past + tokens),
    }:
        raise ValueError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}; "
            f"expected that of token_ids, {(batch, tokens)}"
            + (f", or with the cached tokens {(batch, past + tokens)}" if past else "")
        )
    if attention_mask is not None and attention_mask.is_floating_point():
        raise ValueError(
            f"attention_mask must be integers or booleans (1 real, 0 padding), "
            f"not {attention_mask.dtype}"
        )
    if position_ids is not None and tuple(position_ids.shape) not in {(batch, tokens), (1, tokens)}:
        raise ValueError(
            f"position_ids has the shape {tuple(position_ids.shape)}; expected {(batch, tokens)}"
        )
    if torch.compiler.is_compiling():
        return  # reading values would break the compiled graph; shapes are checked above
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        check_numbers(attention_mask, cache)
    if attention_mask is not None and cache is not None:
        check_cached_part(attention_mask[:, :-tokens], cache)
    outside = (token_ids < 0) | (token_ids >= config.vocab_size)  # (batch, tokens)
    if outside.any():  # the one number for which a GPU is waited for
        wrong = int(token_ids[outside][0])
        raise ValueError(
            f"token id {wrong} is outside the vocabulary of {config.vocab_size} "
            f"(0 to {config.vocab_size - 1}): do the tokenizer and the model belong together?"
        )


def check_numbers(attention_mask: Tensor, cache: "KeyValueCache | None") -> None:
    if int(attention_mask.min()) < 0:
        raise ValueError(
            f"attention_mask holds {int(attention_mask.min())}; expected 0 for padding and 1 for "
            "real tokens (or 1, 2, 3, ... for several texts in a row)"
        )
    if cache is not None and int(attention_mask.max()) > 1:
        raise ValueError("a cache takes one text a row: an attention_mask of 0 and 1")


def check_cached_part(cached_mask: Tensor, cache: "KeyValueCache") -> None:
    """Raise ValueError where a mask, (batch, past), calls a cached token padding that was read as
    real, or the reverse: what the later tokens have computed from it cannot be taken back."""
    if cached_mask.numel() == 0:  # the mask is of the new tokens alone
        return
    if cache.segment_ids is None:
        were_real = torch.ones_like(cached_mask, dtype=torch.bool)  # (batch, past)
    else:
        were_real = cache.segment_ids.bool()  # (batch, past)
    differing = (cached_mask.bool() != were_real).nonzero()  # (n, 2)
    if len(differing):
        row, column = differing[0].tolist()
        was, now = ("real", "padding") if were_real[row, column] else ("padding", "real")
        raise ValueError(
            f"attention_mask calls the cached token in row {row}, column {column} {now}, but it "
            f"was read as {was}: give the mask of padded tokens when they are first read, and "
            "later the same for them, or that of the new tokens alone"
        )


def check_positions(config: GPT2Config, position_ids: Tensor) -> None:
    """Raise ValueError for positions that the model has not learned."""
    if torch.compiler.is_compiling():
        return
    smallest, largest = int(position_ids.min()), int(position_ids.max())
    check_length(config, largest + 1)
    if smallest < 0:
        raise ValueError(f"position {smallest} is negative: positions count from 0")


def check_length(config: GPT2Config, tokens: int) -> None:
    if tokens > config.context_length:
        raise ValueError(
            f"{tokens} tokens do not fit the context of {config.context_length}: "
            "shorten or split the text (in generation: overflow='slide')"
        )
