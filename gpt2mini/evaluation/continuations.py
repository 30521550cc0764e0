"""Log-probabilities of given continuations, by which zero-shot tasks are scored."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from gpt2mini.checks import check_predicts_tokens
from gpt2mini.data.batching import BATCH_TOKENS, batches_by_length
from gpt2mini.data.text import Window, pad_windows
from gpt2mini.device import autocast
from gpt2mini.evaluation.shared_context import (
    Group,
    batches_of_groups,
    read_contexts,
    shared_contexts,
)
from gpt2mini.evaluation.windows import states_and_targets
from gpt2mini.losses.chunked import logprobs_in_chunks
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating
from gpt2mini.reader import cache_dtype
from gpt2mini.tokenizer import Tokenizer


@dataclass(frozen=True)
class Continuation:
    """Token ids of a context and of the continuation to score."""

    context: list[int]
    ids: list[int]

    @staticmethod
    def of(tokenizer: Tokenizer, context: str, text: str) -> "Continuation":
        """Encode context and text separately, which equals encoding both together where `text`
        begins with a space. White space at the end of the context is the text's, as in the
        Evaluation Harness (`_encode_pair`). An empty context becomes <|endoftext|>."""
        kept = context.rstrip()
        ids = tokenizer.encode(context[len(kept) :] + text)
        return Continuation(tokenizer.encode(kept) or [tokenizer.eos_id], ids)


@dataclass(frozen=True)
class Score:
    """log p of each token of a continuation, and whether it was the most likely token."""

    logprobs: Float[Tensor, " tokens"]
    is_likeliest: list[bool]
    first_is_likeliest_allowed: bool  # among the ids not excluded

    @property
    def logprob(self) -> float:
        """log p of the whole continuation, in nats."""
        return float(self.logprobs.sum())


def score_continuations(
    model: GPT2,
    continuations: Sequence[Continuation],
    excluded: Collection[int] = (),
    precision: str = "fp32",
    progress: bool = False,
) -> list[Score]:
    """Score every continuation, in batches of similar length; a context that several have in common
    is read once, where the model takes a cache.

    The model reads all tokens but the last: a continuation may have as many tokens as the model's
    context, and a context that is too long keeps its tail. excluded: ids that
    `first_is_likeliest_allowed` ignores; they do not change log-probabilities. Logits are computed
    for the continuations only, in chunks. Raises ValueError for an empty context or continuation,
    for a continuation longer than the model's context, for a classifier, and for logits that are
    NaN.
    """
    check_predicts_tokens(model)
    rows = [fit(one, model.config.context_length) for one in continuations]
    scores: dict[int, Score] = {}
    device = model.tok_emb.weight.device
    bar = tqdm(total=len(rows), desc="continuations", disable=not progress)
    with evaluating(model), autocast(device, precision), bar:
        for indices, of_batch in score_in_batches(model, rows, excluded):
            scores.update(zip(indices, of_batch, strict=True))
            bar.update(len(indices))
    return [scores[i] for i in range(len(rows))]


def score_in_batches(
    model: GPT2, rows: Sequence[Window], excluded: Collection[int]
) -> Iterator[tuple[list[int], list[Score]]]:
    """(indices of some rows, their scores): first of the rows with a context in common."""
    shared = shared_contexts(rows, model.config.context_length)
    # Asked of the longest context: a model may lose its place in the cache only far from the start.
    longest = max(shared, key=lambda group: rows[group[0]].n_context, default=None)
    if longest is None or not continues_from_cache(model, rows, longest):
        shared = []
    for groups in batches_of_groups(rows, shared):
        yield [i for group in groups for i in group], score_groups(model, rows, groups, excluded)
    alone = sorted(set(range(len(rows))).difference(*shared))
    for batch in batches_by_length([len(rows[i].token_ids) for i in alone], BATCH_TOKENS):
        indices = [alone[i] for i in batch]
        yield indices, score_batch(model, [rows[i] for i in indices], excluded)


def continues_from_cache(model: GPT2, rows: Sequence[Window], group: Group) -> bool:
    """Whether the model gives a group's scores from its cached context, too. One of your own may
    take no cache, or look at tokens in a way that its cache does not know."""
    whole = score_batch(model, [rows[i] for i in group])
    try:
        continued = score_groups(model, rows, [group])
    except (TypeError, ValueError, RuntimeError):  # whatever its own code says to a cache
        return False
    precision = torch.finfo(cache_dtype(model.tok_emb.weight)).eps ** 0.5  # half of the digits
    return all(
        torch.allclose(one.logprobs, other.logprobs, atol=precision, rtol=precision)
        for one, other in zip(whole, continued, strict=True)
    )


def fit(one: Continuation, longest: int) -> Window:
    """Context and continuation in one row, the context cut to what the model can read."""
    if not 0 < len(one.ids) <= longest:
        raise ValueError(
            f"a continuation of {len(one.ids)} tokens cannot be scored: expected 1 to {longest}, "
            "the model's context"
        )
    if not one.context:
        raise ValueError(
            "the context of a continuation is empty: give at least one token, as <|endoftext|>"
        )
    context = one.context[-(longest + 1 - len(one.ids)) :]
    return Window(torch.tensor([*context, *one.ids]), len(context))


def score_groups(
    model: GPT2, rows: Sequence[Window], groups: Sequence[Group], excluded: Collection[int] = ()
) -> list[Score]:
    """The scores of all rows of some groups, whose contexts are read once."""
    cache, left = read_contexts(model, rows, groups)
    return score_batch(model, left, excluded, cache=cache)


def score_batch(
    model: GPT2, rows: Sequence[Window], excluded: Collection[int] = (), **arguments: Any
) -> list[Score]:
    """arguments: of the model, such as `cache`."""
    batch = pad_windows(rows).to(model.tok_emb.weight.device)
    scores = score_tokens(*states_and_targets(model, batch, **arguments), excluded)
    if scores[0].isnan().any():  # an index of the best of them would be the first
        raise ValueError("the log-probabilities contain NaN: check the model's weights and inputs")
    parts = [of_all.cpu().split([row.n_scored for row in rows]) for of_all in scores]
    return [
        Score(logprobs, is_best.tolist(), bool(is_best_allowed[0]))
        for logprobs, is_best, is_best_allowed in zip(*parts, strict=True)
    ]


def score_tokens(
    hidden: Float[Tensor, "n emb"],
    out_head: nn.Module,
    targets: Int[Tensor, " n"],
    excluded: Collection[int] = (),
    chunk_size: int = 64,
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"], Bool[Tensor, " n"]]:
    """(log p of each target, whether it is the most likely token, whether it is so among those not
    excluded), from the hidden states that predict the targets, in chunks."""
    excluded_ids = torch.tensor(sorted(excluded), dtype=torch.long, device=hidden.device)
    parts = []
    chunks = logprobs_in_chunks(hidden, out_head, chunk_size)
    for logprobs, target in zip(chunks, targets.split(chunk_size), strict=True):
        of_target = logprobs.gather(1, target[:, None])[:, 0]  # (chunk)
        is_likeliest = logprobs.argmax(dim=1) == target
        allowed = logprobs.index_fill_(1, excluded_ids, -torch.inf)
        parts.append((of_target, is_likeliest, allowed.argmax(dim=1) == target))
    logprobs, is_likeliest, is_likeliest_allowed = map(torch.cat, zip(*parts, strict=True))
    return logprobs, is_likeliest, is_likeliest_allowed
