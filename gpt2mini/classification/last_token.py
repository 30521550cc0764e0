"""Read a text, name its class: the last real token goes through the head, and no other.

The logits are those of `last_token(model(token_ids, attention_mask), attention_mask)`, for less
work: in the last block only the last token's row is computed, since nobody looks at the others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2mini.classification.labeled import pad_texts
from gpt2mini.data.batching import BATCH_TOKENS, batches_by_length, encode_texts
from gpt2mini.masking import build_attn_mask, last_token
from gpt2mini.model import GPT2, MultiHeadAttention, TransformerBlock
from gpt2mini.modes import evaluating, has_hooks
from gpt2mini.tokenizer import Tokenizer


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
    longest: int | None = None,
) -> list[Prediction]:
    """The class of each text, with probabilities.

    keep: which end of a text of more than `longest` tokens is read, "head" or "tail"; None stands
    for the context. Both should be what they were in training.
    """
    longest = model.config.context_length if longest is None else longest
    rows = encode_texts(texts, tokenizer, longest, keep)
    if not rows:
        return []
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
    if not rows:
        raise ValueError("there are no texts to classify")
    device = model.tok_emb.weight.device
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    with evaluating(model):
        for indices in batches_by_length([len(row) for row in rows], BATCH_TOKENS):
            batch = pad_texts([rows[i] for i in indices], [0] * len(indices)).to(device)
            logits = last_token_logits(model, batch.token_ids, batch.attention_mask)
            for i, row in zip(indices, logits.float().cpu(), strict=True):
                found[i] = row
    return torch.stack(found)


# ---- a forward pass for the last token


def last_token_logits(
    model: GPT2,
    token_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch classes"]:
    """The head's logits at the last real token of each row."""
    x, _ = model.embed(token_ids, attention_mask)  # (batch, tokens, emb)
    return logits_from_block(model, 0, x, attention_mask)


def run_blocks(
    model: GPT2,
    blocks: range,
    x: Float[Tensor, "batch tokens emb"],
    attention_mask: Tensor | None,
) -> Float[Tensor, "batch tokens emb"]:
    """The stream after some of the blocks, one after another."""
    attn_mask = build_attn_mask(x[..., 0], attention_mask, past=0)
    for i in blocks:
        x = model.trf_blocks[i](x, attn_mask)
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
        x_last = block_at_last_token(model.trf_blocks[last], x, attention_mask)
    return model.out_head(model.final_norm(x_last))[:, 0]  # (batch, classes)


def block_at_last_token(
    block: nn.Module, x: Float[Tensor, "batch tokens emb"], attention_mask: Tensor | None
) -> Float[Tensor, "batch 1 emb"]:
    """What a block gives at the last real token, for a fraction of its work."""
    if not (isinstance(block, TransformerBlock) and is_plain(block)):
        pattern = build_attn_mask(x[..., 0], attention_mask, past=0)
        return last_token(block(x, pattern), attention_mask)[:, None]
    if attention_mask is None:
        attention_mask = x.new_ones(x.shape[:2], dtype=torch.bool)  # (batch, tokens)
    x_last = last_token(x, attention_mask)  # (batch, emb)
    seen = attention_of_last_token(block.attn, block.norm1(x), attention_mask)  # (batch, emb)
    x_last = x_last + block.drop(seen)
    x_last = x_last[:, None]  # (batch, 1, emb)
    return x_last + block.drop(block.mlp(block.norm2(x_last)))


def is_plain(block: TransformerBlock) -> bool:
    """Whether it is as `model.py` makes it: no adapters or quantized weights in its attention, no
    class of your own, no hook that looks on."""
    attn = block.attn
    return (
        type(block).forward is TransformerBlock.forward
        and type(attn) is MultiHeadAttention
        and type(attn.key) is type(attn.value) is nn.Linear
        and not any(map(has_hooks, block.modules()))
    )


def attention_of_last_token(
    attn: MultiHeadAttention,
    x: Float[Tensor, "batch tokens emb"],
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"],
) -> Float[Tensor, "batch emb"]:
    """The last real token looks at all tokens of its text, without their keys and values.

    query @ (W x) is (query @ W) @ x: with one query, turning that one around costs less than making
    a key of every token. And the weighted sum of values is the value of the weighted sum. (A bias
    of the keys adds the same to every score, which softmax does not notice.)
    """
    places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])  # (batch, tokens)
    last = last_token(places, attention_mask)[:, None]  # (batch, 1)
    same_text = attention_mask == attention_mask.gather(1, last)  # (batch, tokens)
    visible = same_text & (places <= last)  # in a row of padding the first token sees itself
    query = attn.query(last_token(x, attention_mask)).unflatten(1, (attn.n_heads, -1))
    key_matrix = attn.key.weight.unflatten(0, (attn.n_heads, -1))  # (heads, head_dim, emb)
    value_matrix = attn.value.weight.unflatten(0, (attn.n_heads, -1))  # (heads, head_dim, emb)
    turned = torch.einsum("bhd,hde->bhe", query, key_matrix)  # (batch, heads, emb)
    scores = turned @ x.mT / math.sqrt(query.shape[2])  # (batch, heads, tokens)
    shares = scores.masked_fill(~visible[:, None], -math.inf).softmax(dim=2)
    shares = F.dropout(shares, attn.drop_rate, attn.training)  # (batch, heads, tokens)
    context = torch.einsum("bhe,hde->bhd", shares @ x, value_matrix)  # (batch, heads, head_dim)
    if attn.value.bias is not None:
        bias = attn.value.bias.unflatten(0, (attn.n_heads, -1))  # (heads, head_dim)
        context = context + shares.sum(dim=2, keepdim=True) * bias
    if attn.key.bias is not None and attn.key.bias.requires_grad:
        # of no effect, but part of the graph: DDP waits for the gradient of every parameter
        context = context + 0 * attn.key.bias.sum()
    return attn.attn_out(context.flatten(1))
