"""How likely a model finds given continuations: what zero-shot tasks are scored by."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from gpt2mini.classification import BATCH_TOKENS, batches_by_length
from gpt2mini.logprobs import logprobs_from_hidden
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating
from gpt2mini.padding import pad_right
from gpt2mini.tokenizer import Tokenizer
from gpt2mini.training.precision import autocast


@dataclass(frozen=True)
class Continuation:
    """What stands before, and what is to follow, in token ids."""

    context: list[int]
    ids: list[int]

    @staticmethod
    def of(tokenizer: Tokenizer, context: str, text: str) -> "Continuation":
        """Encoded apart, which is the same as together where `text` begins with a space. Without
        any context, <|endoftext|> stands before."""
        return Continuation(tokenizer.encode(context) or [tokenizer.eos_id], tokenizer.encode(text))


@dataclass(frozen=True)
class Score:
    """log p of each token of a continuation, and whether it was the likeliest token there."""

    logprobs: Float[Tensor, " tokens"]
    is_likeliest: list[bool]
    first_is_likeliest_allowed: bool  # among the ids that were not excluded

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
    """Every continuation scored from left to right, in batches of similar length.

    A context that is too long keeps its tail. excluded: ids that `first_is_likeliest_allowed`
    passes over (log-probabilities know nothing of them). The logits exist only at the tokens asked
    for, a few at a time. Raises ValueError for a continuation that is empty or
    longer than the model's context.
    """
    rows = [fit(one, model.config.context_length) for one in continuations]
    lengths = [len(one.context) + len(one.ids) for one in rows]
    found: dict[int, Score] = {}
    device = model.tok_emb.weight.device
    bar = tqdm(total=len(rows), desc="continuations", disable=not progress)
    with evaluating(model), autocast(device, precision), bar:
        for indices in batches_by_length(lengths, BATCH_TOKENS):
            scores = score_batch(model, [rows[i] for i in indices], excluded)
            found.update(zip(indices, scores, strict=True))
            bar.update(len(indices))
    return [found[i] for i in range(len(rows))]


def fit(one: Continuation, longest: int) -> Continuation:
    """The same with no more of its context than the model can read."""
    if not 0 < len(one.ids) < longest:
        raise ValueError(
            f"a continuation of {len(one.ids)} tokens cannot be scored: expected 1 to "
            f"{longest - 1}, one less than the model's context"
        )
    return Continuation(one.context[-(longest - len(one.ids)) :], one.ids)


def score_batch(
    model: GPT2, rows: Sequence[Continuation], excluded: Collection[int]
) -> list[Score]:
    token_ids, is_real = pad_right([torch.tensor(row.context + row.ids) for row in rows])
    starts = torch.tensor([len(row.context) for row in rows])[:, None]  # (batch, 1)
    asked = is_real & (torch.arange(token_ids.shape[1]) >= starts)  # (batch, tokens)
    device = model.tok_emb.weight.device
    token_ids, is_real, asked = (x.to(device) for x in (token_ids, is_real, asked))
    hidden = model.hidden_states(token_ids, None if is_real.all() else is_real)
    logprobs = logprobs_from_hidden(hidden, model.out_head, token_ids, asked)[asked]  # (n)
    best = likeliest_tokens(hidden[:, :-1][asked[:, 1:]], model.out_head, excluded)
    parts = [
        x.cpu().split([len(row.ids) for row in rows])
        for x in (logprobs, *(ids == token_ids[asked] for ids in best))
    ]
    return [
        Score(logprobs, is_best.tolist(), bool(is_best_allowed[0]))
        for logprobs, is_best, is_best_allowed in zip(*parts, strict=True)
    ]


def likeliest_tokens(
    hidden: Float[Tensor, "n emb"],
    out_head: nn.Module,
    excluded: Collection[int] = (),
    chunk_size: int = 64,
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """The likeliest next token at each position: (of all, of those that are not excluded)."""
    barred = torch.tensor(sorted(excluded), dtype=torch.long, device=hidden.device)
    best, best_allowed = [], []
    for chunk in hidden.split(chunk_size):  # (chunk, emb)
        logits = out_head(chunk)  # (chunk, vocab)
        best.append(logits.argmax(dim=1))
        best_allowed.append(logits.index_fill(1, barred, -torch.inf).argmax(dim=1))
    return torch.cat(best), torch.cat(best_allowed)
