"""The data of one model: its numbers of a text and, if the page is live, its weights."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from gpt2mini.data.samples import sample
from gpt2mini.inspection.ablation import Progress, mean_activations
from gpt2mini.inspection.explorer.recorded import packed, recorded_numbers
from gpt2mini.inspection.explorer.weights import (
    PackedModel,
    StoredTensor,
    packed_difference,
    packed_model,
    plain_model,
    stored_model,
)
from gpt2mini.inspection.heads import (
    HeadScores,
    first_token_score,
    head_scores,
    induction_score,
    previous_token_score,
)
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating
from gpt2mini.tokenizer import Tokenizer

MEANS = ("head.*", "attn_out", "mlp_out")  # activations of which the page has the mean
MOST_TOKENS = 128  # of a text that the page reads; attention grows with the square


@dataclass(frozen=True)
class TextShown:
    """The text with which the page begins."""

    token_ids: Tensor  # (1, tokens)
    forbidden_ids: list[int]
    tokenizer: Tokenizer
    progress: Progress | None


def recorded_model(model: GPT2, shown: TextShown) -> dict[str, Any]:
    """The data of a model that the page has numbers of, and no weights."""
    token_ids = shown.token_ids.to(model.tok_emb.weight.device)
    names = ("n_layers", "n_heads", "emb_dim", "vocab_size", "context_length", "gelu")
    return {
        "config": {name: getattr(model.config, name) for name in names},
        "tensors": {},
        "adapters": {},
        "recorded": recorded_numbers(model, token_ids, shown.forbidden_ids, shown.progress),
        "check": None,
    } | scores_of_heads(model)


def live_models(
    models: list[GPT2], precision: str, shown: TextShown
) -> list[tuple[dict[str, Any], bytes]]:
    """(data, gzipped weights) of each model. All numbers are computed with the packed weights."""
    first = packed_model(models[0], precision)
    packed_models = [first]
    packed_models += [packed_difference(models[0], first, one, precision) for one in models[1:]]
    found = [live_model(*pair, shown) for pair in zip(models, packed_models, strict=True)]
    for data, _ in found[1:]:
        data["recorded"] = None  # a page that is not live after all shows the first model alone
    return found


def live_model(
    model: GPT2, packed_weights: PackedModel, shown: TextShown
) -> tuple[dict[str, Any], bytes]:
    plain = plain_model(model, packed_weights.weights)
    packed_weights.tensors.update(means(plain, shown.tokenizer))
    index, adapters, blob = stored_model(packed_weights)
    data = recorded_model(plain, shown)
    return data | {
        "tensors": index,
        "adapters": adapters,
        "check": check(plain, shown.tokenizer),
    }, blob


def scores_of_heads(model: GPT2) -> dict[str, Any]:
    """Two parts of a model's data. "head_scores": of each kind [layer][head], from 0 to 1; zeros
    where the context is too short to measure them. "even_scores": see `even_scores`."""
    period = min(32, model.config.context_length // 2)
    even = even_scores(max(2, period))
    if period < 2:
        zeros = torch.zeros(model.config.n_layers, model.config.n_heads)
        scores = HeadScores(zeros, zeros, zeros)
    else:
        scores = head_scores(model, period)
    return {
        "head_scores": {
            kind: [[round(score, 4) for score in layer] for layer in getattr(scores, kind).tolist()]
            for kind in even
        },
        "even_scores": even,
    }


def even_scores(period: int) -> dict[str, float]:
    """The scores of a head whose weights are equal over all tokens that it may read, on `period`
    tokens and the same again."""
    may_read = torch.ones(1, 1, 2 * period, 2 * period).tril()
    attention = may_read / may_read.sum(dim=-1, keepdim=True)  # (batch, heads, tokens, tokens)
    return {
        "previous_token": previous_token_score(attention).item(),
        "induction": induction_score(attention, period).item(),
        "first_token": first_token_score(attention).item(),
    }


def means(model: GPT2, tokenizer: Tokenizer) -> dict[str, StoredTensor]:
    """For mean ablation: the means over all positions of a bundled text of the heads' outputs
    ("context", heads one after another) and of what attention and the MLP add."""
    token_ids = bundled_text(model, tokenizer)  # (rows, width)
    found = mean_activations(model, token_ids, [f"blocks.*.{part}" for part in MEANS])
    stored = {}
    for layer, heads in enumerate(by_layer(found, model)):
        stored[f"means.blocks.{layer}.context"] = torch.cat(heads)
        for part in MEANS[1:]:
            stored[f"means.blocks.{layer}.{part}"] = found[f"blocks.{layer}.{part}"]
    return {name: StoredTensor(mean.numpy()) for name, mean in stored.items()}


def by_layer(found: dict[str, Tensor], model: GPT2) -> list[list[Tensor]]:
    """Of each block the activations of its heads."""
    layers, heads = range(model.config.n_layers), range(model.config.n_heads)
    return [[found[f"blocks.{layer}.head.{head}"] for head in heads] for layer in layers]


def check(model: GPT2, tokenizer: Tokenizer) -> dict[str, Any]:
    """Logits at some positions of a text as long as the page can read, with which the page compares
    those of its engine. (A change of model.py may matter in a long text alone.)"""
    token_ids = bundled_text(model, tokenizer)[:1]  # (1, tokens)
    n_tokens = token_ids.shape[1]
    positions = sorted({0, n_tokens // 2, n_tokens - 1})
    with evaluating(model):
        logits = model(token_ids)[0, positions]  # (positions, vocab)
    return {
        "token_ids": token_ids[0].tolist(),
        "positions": positions,
        "logits": packed(logits, "<f4"),
    }


def bundled_text(model: GPT2, tokenizer: Tokenizer) -> Int[Tensor, "rows tokens"]:
    """A text of the package, in rows as long as the page can read."""
    ids = tokenizer.encode(sample("general.txt").read_text(encoding="utf-8"))
    width = min(MOST_TOKENS, model.config.context_length)
    rows = max(1, len(ids) // width)
    return torch.tensor(ids[: rows * width]).view(rows, -1)
