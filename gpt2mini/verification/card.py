"""A model's own card: facts measured once and kept in its folder, by which a damaged, changed or
foreign copy is noticed."""

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from gpt2mini.checkpoints.hub import CARD
from gpt2mini.checks import check_predicts_tokens
from gpt2mini.data.samples import sample
from gpt2mini.files import read_json, write_json
from gpt2mini.model import GPT2
from gpt2mini.tokenizer import Tokenizer
from gpt2mini.verification.contents import (
    FileChecksum,
    Hyperparameters,
    ParameterCount,
    TensorDigests,
    VocabularyDigests,
)
from gpt2mini.verification.environment import environment
from gpt2mini.verification.facts import Fact, Installation
from gpt2mini.verification.outputs import (
    BitsPerByte,
    GreedyTexts,
    Logits,
    greedy_ids,
    logits_of,
)
from gpt2mini.verification.task_figures import TaskFigure

KINDS: dict[str, Callable[..., Fact]] = {
    kind.__name__: kind
    for kind in (
        *(FileChecksum, Hyperparameters, ParameterCount, TensorDigests, VocabularyDigests),
        *(GreedyTexts, Logits, BitsPerByte, TaskFigure),
    )
}

CHARACTERS = 1000  # of the text whose bits per byte are measured
POSITIONS, LIKELIEST = (3, 10, 30), 3  # whose logits are kept, and of how many tokens
NEW_TOKENS, PROMPTS, WORDS = 16, 4, 6  # of each continuation; of them; words of a prompt
# Logits of one model differ by 1e-4 at most between float32 kernels, and by 0.04 in bfloat16 (see
# tests/benchmarks/README.md): a continuation of this margin is the same on any processor.
MARGIN = 0.1
LOGIT_TOLERANCE, BITS_TOLERANCE = 0.01, 0.001

# ---- files


def write_card(installation: Installation, facts: list[Fact]) -> Path:
    """Write facts into the model's folder. Returns the path."""
    rows = [{"kind": type(fact).__name__, **asdict(fact)} for fact in facts]
    about = "what `gpt2mini verify` expects of the model in this folder"
    written_with = environment(installation.device)
    path = installation.folder / CARD
    write_json(path, {"about": about, "written_with": written_with, "facts": rows})
    return path


def read_card(path: Path) -> list[Fact]:
    """The facts of a card's file. Raises ValueError, naming the file, for one that is no card."""
    contents = read_json(path)
    rows = contents.get("facts") if isinstance(contents, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} is no card of `gpt2mini verify --write-card`: it has no facts")
    return [read_fact(path, dict(row)) for row in rows]


def read_fact(path: Path, row: dict[str, Any]) -> Fact:
    kind = row.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"{path} has a fact of the kind {kind!r}: expected {', '.join(KINDS)}")
    try:
        return KINDS[kind](**row)
    except TypeError as error:
        raise ValueError(f"{path} has a {kind} with other fields than it should: {error}") from None


# ---- measuring


def make_facts(installation: Installation) -> list[Fact]:
    """The facts of a model as it is now. Raises ValueError for a classifier."""
    model, tokenizer = installation.model, installation.tokenizer
    check_predicts_tokens(model)
    text = sample("general.txt").read_text(encoding="utf-8")
    config = {name: value for name, value in asdict(model.config).items() if name != "drop_rate"}
    unmeasured = [
        ParameterCount(expected=0),
        TensorDigests(expected={}),
        VocabularyDigests(expected={}),
        likeliest_logits(model, tokenizer, text[: CHARACTERS // 4]),
        BitsPerByte(text=text[:CHARACTERS], expected=0.0, tolerance=BITS_TOLERANCE),
    ]
    return [
        Hyperparameters(expected=config),
        *(replace(fact, expected=fact.find(installation)) for fact in unmeasured),
        *greedy_facts(model, tokenizer, text),
    ]


def likeliest_logits(model: GPT2, tokenizer: Tokenizer, text: str) -> Logits:
    """Of the likeliest tokens at some positions; their values are to be measured."""
    logits = logits_of(model, tokenizer.encode(text))
    last = logits.shape[0] - 1
    places = [
        [position, token, 0.0]
        for position in sorted({min(position, last) for position in POSITIONS})
        for token in logits[position].topk(LIKELIEST).indices.tolist()
    ]
    return Logits(text=text, expected=places, tolerance=LOGIT_TOLERANCE)


def greedy_facts(model: GPT2, tokenizer: Tokenizer, text: str) -> list[GreedyTexts]:
    """Of the beginnings of the text's sentences, the first ones whose continuations have a margin
    of at least `MARGIN`."""
    longest = model.config.context_length - NEW_TOKENS
    prompts = [prompt for prompt in beginnings(text) if len(tokenizer.encode(prompt)) <= longest]
    facts = []
    for prompt, ids in zip(prompts, greedy_ids(model, tokenizer, prompts, NEW_TOKENS), strict=True):
        fact = GreedyTexts(
            prompts=[prompt],
            expected=[tokenizer.decode(ids)],
            new_tokens=NEW_TOKENS,
            margin=round(margin(model, tokenizer.encode(prompt), ids), 3),
        )
        facts.append(fact)
    return [fact for fact in facts if (fact.margin or 0.0) >= MARGIN][:PROMPTS]


def beginnings(text: str) -> list[str]:
    """The first words of each sentence that has more."""
    sentences = [sentence.split() for sentence in re.split(r"(?<=[.!?])\s+|\n+", text)]
    return [" ".join(words[:WORDS]) for words in sentences if len(words) > WORDS]


def margin(model: GPT2, prompt: list[int], continuation: list[int]) -> float:
    """How far the second token stays behind the first, in logits, where it comes nearest."""
    logits = logits_of(model, prompt + continuation)[len(prompt) - 1 : -1]
    first, second = logits.topk(2).values.unbind(dim=-1)
    return float(torch.min(first - second))
