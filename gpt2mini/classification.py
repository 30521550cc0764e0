"""Read a text, name its class: the last real token goes through the head, and no other.

The logits are those of `last_token(model(token_ids, attention_mask), attention_mask)`, for less
work: in the last block only the last token's row is computed, since nobody looks at the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gpt2mini.cache import LayerCache
from gpt2mini.data.labelled import encode_texts, pad_texts
from gpt2mini.model import GPT2, TransformerBlock
from gpt2mini.modes import evaluating
from gpt2mini.padding import (
    attention_pattern,
    check_input,
    check_positions,
    count_positions,
    last_token,
    text_numbers,
)
from gpt2mini.tokenizer import Tokenizer

BATCH_TOKENS = 4096  # padding counted, where no gradient is asked for


@dataclass(frozen=True)
class Prediction:
    """What a classifier thinks of a text."""

    class_name: str
    probabilities: dict[str, float]  # of every class


def predict(
    model: GPT2,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    class_names: Sequence[str],
    keep: str = "head",
) -> list[Prediction]:
    """The class of each text, with probabilities. keep: which end of a text that is too long for
    the context is read, "head" or "tail"."""
    rows = encode_texts(texts, tokenizer, model.config.context_length, keep)
    probabilities = class_logits(model, rows).softmax(dim=1)  # (texts, classes)
    if probabilities.shape[1] != len(class_names):
        raise ValueError(
            f"{len(class_names)} class names for a head of {probabilities.shape[1]} outputs: "
            "is this model a classifier?"
        )
    return [
        Prediction(
            class_names[int(row.argmax())], dict(zip(class_names, row.tolist(), strict=True))
        )
        for row in probabilities
    ]


def class_logits(model: GPT2, rows: Sequence[Tensor]) -> Float[Tensor, "texts classes"]:
    """Logits of many texts, given as token ids, in batches of similar length; in float32, on the
    CPU, in eval mode and without gradients."""
    device = model.tok_emb.weight.device
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    with evaluating(model):
        for indices in batches_by_length([len(row) for row in rows], BATCH_TOKENS):
            batch = pad_texts([rows[i] for i in indices], [0] * len(indices)).to(device)
            logits = last_token_logits(model, batch.token_ids, batch.attention_mask)
            for i, row in zip(indices, logits.float().cpu(), strict=True):
                found[i] = row
    return torch.stack(found)


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in the order of length, longest first, cut so that no batch has more tokens."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


# ---- a forward pass for the last token


def last_token_logits(
    model: GPT2,
    token_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch classes"]:
    """The head's logits at the last real token of each row."""
    return logits_from_block(model, 0, embed(model, token_ids, attention_mask), attention_mask)


def embed(
    model: GPT2, token_ids: Int[Tensor, "batch tokens"], attention_mask: Tensor | None
) -> Float[Tensor, "batch tokens emb"]:
    """The stream as it enters the first block."""
    check_input(model.config, token_ids, attention_mask, None, None)
    position_ids = count_positions(token_ids, text_numbers(token_ids, attention_mask, None), 0)
    check_positions(model.config, position_ids)
    return model.drop_emb(model.tok_emb(token_ids) + model.pos_emb(position_ids))


def run_blocks(
    model: GPT2,
    blocks: range,
    x: Float[Tensor, "batch tokens emb"],
    attention_mask: Tensor | None,
) -> Float[Tensor, "batch tokens emb"]:
    """The stream after some of the blocks, one after another."""
    may_attend = attention_pattern(x[..., 0], attention_mask, past=0)
    for i in blocks:
        x = model.trf_blocks[i](x, may_attend)
    return x


def logits_from_block(
    model: GPT2,
    first: int,
    x: Float[Tensor, "batch tokens emb"],
    attention_mask: Tensor | None,
) -> Float[Tensor, "batch classes"]:
    """The head's logits at the last real token, for a stream that is about to enter a block.

    first: its number; `n_layers` for a stream that has left the last one.
    """
    last = model.config.n_layers - 1
    if first > last:
        x_last = last_token(x, attention_mask)[:, None]  # (batch, 1, emb)
    else:
        x = run_blocks(model, range(first, last), x, attention_mask)
        block = model.trf_blocks[last]
        assert isinstance(block, TransformerBlock)
        x_last = block_at_last_token(block, x, attention_mask)
    return model.out_head(model.final_norm(x_last))[:, 0]  # (batch, classes)


def block_at_last_token(
    block: TransformerBlock, x: Float[Tensor, "batch tokens emb"], attention_mask: Tensor | None
) -> Float[Tensor, "batch 1 emb"]:
    """What a block gives at the last real token: generation's step, with a cache of all tokens.

    The last token brings its own key and value again, so its place among the others is masked.
    """
    batch, tokens, _ = x.shape
    normed = block.norm1(x)
    cache = EarlierTokens(
        block.attn.split_heads(block.attn.key(normed)),
        block.attn.split_heads(block.attn.value(normed)),
    )
    places = torch.arange(tokens, device=x.device)  # (tokens)
    is_real = x.new_ones(batch, tokens, dtype=torch.bool)
    if attention_mask is not None:
        is_real = attention_mask.bool()
    is_last = places == last_token(places.expand(batch, tokens), is_real)[:, None]
    itself = is_real.new_ones(batch, 1)
    may_attend = torch.cat([is_real & ~is_last, itself], dim=1)[:, None, None]
    return block(last_token(x, is_real)[:, None], may_attend, cache)


class EarlierTokens(LayerCache):
    """Keys and values that are there already, with their gradients; what is new stands behind."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
