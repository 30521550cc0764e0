"""Classify a text by its last real token, the one that attends to the whole text.

`last_token_logits(model, token_ids, attention_mask)` gives what
`last_token(model(token_ids, attention_mask), attention_mask)` gives, for less work: the last block
and the head compute the output at that token alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gpt2mini.classification.labeled import pad_texts
from gpt2mini.data.batching import BATCH_TOKENS, batches_by_length, encode_texts
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating
from gpt2mini.reader import last_token_logits
from gpt2mini.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prediction:
    """The class of a text."""

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
