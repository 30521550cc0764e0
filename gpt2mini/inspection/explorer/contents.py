"""What the page holds: its data, its tokenizer, the weights of its models.

A page is live if the models run in it: their weights are in the page, and any text can be read.
Otherwise it holds the numbers of one text. A live page has such numbers too, of the beginning of
the text and computed with the weights of the page: it shows them if its engine fails the check with
which it starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpt2mini.checks import check_predicts_tokens
from gpt2mini.config import GPT2Config
from gpt2mini.inspection.ablation import Progress
from gpt2mini.inspection.compare import effective_weights
from gpt2mini.inspection.explorer.architecture import parts
from gpt2mini.inspection.explorer.model_data import (
    MOST_TOKENS,
    TextShown,
    live_models,
    recorded_model,
)
from gpt2mini.inspection.explorer.plain_models import why_not_live
from gpt2mini.inspection.explorer.tokenizer_data import pack_tokenizer
from gpt2mini.model import GPT2
from gpt2mini.quantized_layers import refuse_quantized
from gpt2mini.tokenizer import Tokenizer

RECORDED_IF_LIVE = 16  # tokens; 128 would make gpt2-nano's page a third larger
SMALL = 50_000_000  # parameters; "auto" makes pages of smaller models live
PRECISIONS = {"int8": "int8", "fp16": "float16"}  # --live -> weights.py
SIZES = ("n_layers", "n_heads", "emb_dim", "vocab_size", "context_length", "qkv_bias")
EXAMPLES = (
    "The old keeper lit the lamp. Then the old keeper",  # a phrase again: what followed it?
    "Mr. Bingley went out. Mrs. Bennet stayed at home. Then Mr.",  # a name
    "Mary took her hat and John took his coat. Mary put on her",  # whose was it?
    '"I do not know," he said. "I do not',  # a quotation
    "North, south, east, west, north, south,",  # a list
)


@dataclass(frozen=True)
class Origin:
    """The names with which the page's Python loads a model: for `GPT2.from_pretrained`, and of a
    model with an adapter for `load_adapter`. Names, not paths: pages are sent to others."""

    base: str
    adapter: str | None = None


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
    origins: Sequence[Origin] = (),
) -> Contents:
    """Arguments and errors as of `write_page`."""
    models = [model] if other is None else [model, other]
    check_models(models)
    text = well_formed(text)
    most_tokens = min(MOST_TOKENS, model.config.context_length)
    ids = tokenizer.encode(text)
    if not 1 <= len(ids) <= most_tokens:
        raise ValueError(f"the page shows from 1 to {most_tokens} tokens; the text has {len(ids)}")
    precision, why = choose_precision(models, live)
    is_live = precision is not None
    if is_live:
        ids = beginning(tokenizer, ids)
    missing = tokenizer.missing_ids(model.config.vocab_size)
    shown = TextShown(torch.tensor([ids]), missing, tokenizer, progress)
    found = data_of_models(models, precision, shown)
    for (of_model, _), its_name in zip(found, (name, other_name), strict=False):
        of_model["name"] = well_formed(its_name)
    add_origins([of_model for of_model, _ in found], origins)
    data = {
        "live": is_live,
        "text": text,
        "recorded_text": tokenizer.decode(ids) if is_live else text,
        "examples": examples(tokenizer, most_tokens) if is_live else [],
        "most_tokens": most_tokens,
        "forbidden_ids": missing,
        "parts": parts(model),
        "models": [of_model for of_model, _ in found],
    }
    weights = [blob for _, blob in found if blob]
    return Contents(data, pack_tokenizer(tokenizer), weights, precision, why)


def check_models(models: list[GPT2]) -> None:
    """Raise ValueError for models that no page can show, or not beside each other."""
    for model in models:
        refuse_quantized(model, "the explorer's page")
        check_predicts_tokens(model)
        check_weights(model)
    check_same_sizes(models[0].config, models[-1].config)


def data_of_models(
    models: list[GPT2], precision: str | None, shown: TextShown
) -> list[tuple[dict[str, Any], bytes]]:
    """(data, gzipped weights) of each model; no weights in a page that is not live."""
    if precision is None:
        found = [(recorded_model(model, shown), b"") for model in models]
    else:
        found = live_models(models, precision, shown)
    for model, (data, _) in zip(models, found, strict=True):
        data |= {"n_parameters": count(model), "precision": precision}
    return found


def add_origins(models: list[dict[str, Any]], origins: Sequence[Origin]) -> None:
    """Add "base" and "adapter" to the data of each model. Without origins they are its name."""
    first = models[0]["name"]
    for i, data in enumerate(models):
        name = data["name"]
        default = Origin(first, name) if data["adapters"] else Origin(name)
        origin = origins[i] if origins else default
        data["base"] = well_formed(origin.base)
        data["adapter"] = None if origin.adapter is None else well_formed(origin.adapter)


def well_formed(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, as the tokenizer reads it: a file in
    UTF-8, or an address, cannot hold them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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


def check_same_sizes(first: GPT2Config, second: GPT2Config) -> None:
    """Raise ValueError for two models of different sizes: the page draws them over each other."""
    for name in SIZES:
        ours, theirs = getattr(first, name), getattr(second, name)
        if ours != theirs:
            raise ValueError(
                "only models of the same shape can be compared: "
                f"{name} is {ours} in the first and {theirs} in the second"
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
