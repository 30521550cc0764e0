"""What the page holds: its data, its tokenizer, the weights of its models.

A page is live if the models run in it: their weights are in the page, and any text can be read.
Otherwise it holds the numbers of one text. A live page has such numbers too, of the beginning of
the text and computed with the weights of the page: it shows them if its engine fails the check with
which it starts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpt2mini.checks import check_predicts_tokens
from gpt2mini.data.samples import sample
from gpt2mini.inspection.ablation import Progress, mean_activations
from gpt2mini.inspection.compare import effective_weights
from gpt2mini.inspection.explorer.architecture import parts
from gpt2mini.inspection.explorer.plain_models import why_not_live
from gpt2mini.inspection.explorer.recorded import packed, recorded_numbers
from gpt2mini.inspection.explorer.tokenizer_data import pack_tokenizer
from gpt2mini.inspection.explorer.weights import (
    PackedModel,
    StoredTensor,
    packed_difference,
    packed_model,
    plain_model,
    stored_model,
)
from gpt2mini.inspection.heads import head_scores
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating
from gpt2mini.tokenizer import Tokenizer

MOST_TOKENS = 128  # attention grows with the square
RECORDED_IF_LIVE = 16  # tokens; 128 would make gpt2-nano's page a third larger
SMALL = 50_000_000  # parameters; "auto" makes pages of smaller models live
PRECISIONS = {"int8": "int8", "fp16": "float16"}  # --live -> weights.py
MEANS = ("head.*", "attn_out", "mlp_out")  # activations of which the page has the mean
EXAMPLES = (
    "The old keeper lit the lamp. Then the old keeper",
    "One, two, three, four, one, two, three,",
    '"Where are you going?" asked the boy. "To the',
    "Apples, pears, plums and",
    "Anna gave the book to Peter, and Peter gave the book to",
)


@dataclass(frozen=True)
class Contents:
    """data: for JSON. tokenizer, weights: gzipped bytes; weights of each model if the page is live.
    precision: of the weights."""

    data: dict[str, Any]
    tokenizer: bytes
    weights: list[bytes]
    precision: str | None
    why_not_live: str | None


def page_data(
    model: GPT2,
    tokenizer: Tokenizer,
    text: str,
    name: str = "GPT-2",
    *,
    other: GPT2 | None = None,
    other_name: str = "other",
    live: str = "auto",
) -> dict[str, Any]:
    """All that the page shows, ready for JSON; arguments and errors as of `write_page`."""
    return page_contents(model, tokenizer, text, name, other, other_name, live).data


def page_contents(
    model: GPT2,
    tokenizer: Tokenizer,
    text: str,
    name: str,
    other: GPT2 | None,
    other_name: str,
    live: str,
    progress: Progress | None = None,
) -> Contents:
    """Arguments and errors as of `write_page`."""
    models = [model] if other is None else [model, other]
    for one in models:
        check_predicts_tokens(one)
        check_weights(one)
    most_tokens = min(MOST_TOKENS, model.config.context_length)
    ids = tokenizer.encode(text)
    if not 1 <= len(ids) <= most_tokens:
        raise ValueError(f"the page shows from 1 to {most_tokens} tokens; the text has {len(ids)}")
    forbidden_ids = tokenizer.missing_ids(model.config.vocab_size)
    precision, why = choose_precision(models, live)
    if precision is not None:
        ids = beginning(tokenizer, ids)
    shown = TextShown(torch.tensor([ids]), forbidden_ids, tokenizer, progress)
    if precision is None:
        found = [(recorded_model(one, shown), b"") for one in models]
    else:
        found = live_models(models, precision, shown)
    for one, (of_model, _), its_name in zip(models, found, (name, other_name), strict=False):
        of_model |= {"name": its_name, "n_parameters": count(one), "precision": precision}
    data = {
        "live": precision is not None,
        "text": text,
        "recorded_text": text if precision is None else tokenizer.decode(ids),
        "examples": examples(tokenizer, most_tokens) if precision else [],
        "most_tokens": most_tokens,
        "forbidden_ids": forbidden_ids,
        "parts": parts(model),
        "models": [of_model for of_model, _ in found],
    }
    weights = [blob for _, blob in found if blob]
    return Contents(data, pack_tokenizer(tokenizer), weights, precision, why)


def beginning(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The tokens of which a live page keeps numbers: the first ones, whose text has these tokens
    again; a text that has none such is kept whole."""
    for n in range(min(len(ids), RECORDED_IF_LIVE), 0, -1):
        if tokenizer.encode(tokenizer.decode(ids[:n])) == ids[:n]:
            return ids[:n]
    return ids


def check_weights(model: GPT2) -> None:
    """Raise ValueError for weights with a number that is not finite."""
    for name, weight in effective_weights(model).items():
        if not weight.isfinite().all():
            raise ValueError(
                f"{name} has numbers that are not finite (NaN or infinity): training has failed, "
                "or the file is damaged; there is nothing to show"
            )


def choose_precision(models: list[GPT2], live: str) -> tuple[str | None, str | None]:
    """(precision of the weights in the page, None), or (None, why the page is not live).

    Raises ValueError for a live page of a model that the page's engine cannot compute.
    """
    if live not in ("auto", "off", *PRECISIONS):
        raise ValueError(f"live must be auto, {', '.join(PRECISIONS)} or off, not {live!r}")
    if live == "off":
        return None, "live is off"
    why = next(filter(None, map(why_not_live, models)), None)
    if live in PRECISIONS and why:
        raise ValueError(
            f"the page cannot run this model, only show numbers of one text (live off): {why}"
        )
    if live == "auto" and why is None and count(models[0]) >= SMALL:
        why = f"the model has {count(models[0]):,} parameters, and auto is live below {SMALL:,}"
    return (None, why) if why else (PRECISIONS.get(live, "int8"), None)


def count(model: GPT2) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def examples(tokenizer: Tokenizer, most_tokens: int) -> list[str]:
    return [text for text in EXAMPLES if len(tokenizer.encode(text)) <= most_tokens]


# ---- one model


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
        "head_scores": scores_of_heads(model),
        "recorded": recorded_numbers(model, token_ids, shown.forbidden_ids, shown.progress),
        "check": None,
    }


def live_models(
    models: list[GPT2], precision: str, shown: TextShown
) -> list[tuple[dict[str, Any], bytes]]:
    """(data, gzipped weights) of each model. All numbers are computed with the packed weights."""
    first = packed_model(models[0], precision)
    packed_models = [first]
    packed_models += [packed_difference(models[0], first, one, precision) for one in models[1:]]
    return [live_model(*pair, shown) for pair in zip(models, packed_models, strict=True)]


def live_model(
    model: GPT2, packed_weights: PackedModel, shown: TextShown
) -> tuple[dict[str, Any], bytes]:
    plain = plain_model(model, packed_weights.weights)
    packed_weights.tensors.update(means(plain, shown.tokenizer))
    index, adapters, blob = stored_model(packed_weights)
    data = recorded_model(plain, shown)
    return data | {"tensors": index, "adapters": adapters, "check": check(plain, shown)}, blob


def scores_of_heads(model: GPT2) -> dict[str, list[list[float]]]:
    """[layer][head], from 0 to 1; zeros where the context is too short to measure them."""
    kinds = ("previous_token", "induction", "first_token")
    period = min(32, model.config.context_length // 2)
    if period < 2:
        zeros = [[0.0] * model.config.n_heads] * model.config.n_layers
        return dict.fromkeys(kinds, zeros)
    scores = head_scores(model, period)
    return {
        kind: [[round(score, 4) for score in layer] for layer in getattr(scores, kind).tolist()]
        for kind in kinds
    }


def means(model: GPT2, tokenizer: Tokenizer) -> dict[str, StoredTensor]:
    """For mean ablation: the means over all positions of a bundled text of the heads' outputs
    ("context", heads one after another) and of what attention and the MLP add."""
    text = tokenizer.encode(sample("general.txt").read_text(encoding="utf-8"))
    width = min(MOST_TOKENS, model.config.context_length)
    rows = max(1, len(text) // width)
    token_ids = torch.tensor(text[: rows * width]).view(rows, -1)  # (rows, width)
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


def check(model: GPT2, shown: TextShown) -> dict[str, Any]:
    """Logits at some positions of the text, with which the page compares those of its engine."""
    n_tokens = shown.token_ids.shape[1]
    positions = sorted({0, n_tokens // 2, n_tokens - 1})
    with evaluating(model):
        logits = model(shown.token_ids)[0, positions]  # (positions, vocab)
    return {
        "token_ids": shown.token_ids[0].tolist(),
        "positions": positions,
        "logits": packed(logits, "<f4"),
    }
