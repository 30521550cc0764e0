"""Ablation: what a model predicts without one of its parts.

    means = mean_activations(model, token_ids, ["blocks.3.head.5"])
    with patched(model, means):                              # mean ablation of one head
        logits = model(other_ids)

    effects = head_effects(model, token_ids, target=tokenizer.encode(" lit")[0])
    effects.strongest(3)                       # [(layer, head, probability without it), ...]

**Zero ablation** replaces an activation by zeros. The layers after it never saw zeros in training,
so **mean ablation** puts the activation's mean over many positions there instead: what it says
about this text is gone, and what it says of any text stays (Wang et al. 2022, "Interpretability in
the Wild", section 2.1).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gpt2mini.checks import check_predicts_tokens
from gpt2mini.inspection.tracing import Trace, patched, trace
from gpt2mini.model import GPT2, accepts_shortcut
from gpt2mini.modes import evaluating
from gpt2mini.sampling import FORBIDDEN

MOST_LOGITS = 2**24  # in memory at once: 64 MB
Progress = Callable[[int, int], object]  # is told (passes done, passes in all)


def mean_activations(
    model: GPT2, token_ids: Int[Tensor, "batch tokens"], names: Sequence[str]
) -> dict[str, Float[Tensor, "_"]]:
    """The mean of each named activation over all positions of all rows, for `patched`.

    names: as for `trace`, `*` standing for anything, as in "blocks.*.mlp_out". The texts should be
    many and of many kinds. Raises ValueError as `trace`, and for attention weights, whose mean over
    the positions says nothing.
    """
    found = trace(model, token_ids, names=names)
    if weights := [name for name in found if name.endswith(".attention")]:
        raise ValueError(f"{weights[0]} has no mean over positions: leave attention weights out")
    return {name: found[name].float().flatten(0, -2).mean(dim=0) for name in found}


@dataclass(frozen=True)
class HeadEffects:
    """The probability of one token at one position, with all heads and without each of them."""

    target: int
    before: float
    after: Float[Tensor, "layers heads"]

    def strongest(self, n: int = 5) -> list[tuple[int, int, float]]:
        """(layer, head, probability without it), the largest change first."""
        order = (self.after - self.before).abs().flatten().argsort(descending=True)[:n].tolist()
        n_heads = self.after.shape[1]
        return [(i // n_heads, i % n_heads, float(self.after.flatten()[i])) for i in order]


def head_effects(
    model: GPT2,
    token_ids: Int[Tensor, "1 tokens"],
    position: int = -1,
    target: int | None = None,
    forbidden_ids: Sequence[int] = (),
) -> HeadEffects:
    """The probability of `target` as the token after `position`, without each head (zeros).

    target: the default is the most likely token. forbidden_ids: as in `logit_lens`.
    Raises ValueError for several texts, a position outside the text, a classifier, and heads that
    `patched` cannot observe in this model.
    """
    check_predicts_tokens(model)
    if token_ids.ndim != 2 or len(token_ids) != 1:
        raise ValueError(
            f"token_ids must have the shape (1, tokens), one text; got {tuple(token_ids.shape)}"
        )
    tokens = token_ids.shape[1]
    if not -tokens <= position < tokens:
        raise ValueError(f"position {position} is not in the text of {tokens} tokens")
    position %= tokens
    text = token_ids[:, : position + 1]  # no later token has an influence
    if target is None:
        with evaluating(model):
            logits = allowed(model(text)[0, -1].float(), forbidden_ids)  # (vocab)
        target = int(logits.argmax())
    targets = torch.full((position + 1,), target)
    layers, heads = range(model.config.n_layers), range(model.config.n_heads)
    names = [f"blocks.{layer}.head.{head}" for layer in layers for head in heads]
    before, after = ablation_effects(model, text, names, targets, forbidden_ids)
    return HeadEffects(target, float(before[-1]), after[:, -1].view(len(layers), len(heads)))


def ablation_effects(
    model: GPT2,
    token_ids: Int[Tensor, "1 tokens"],
    names: Sequence[str],
    targets: Int[Tensor, " tokens"],
    forbidden_ids: Sequence[int] = (),
    progress: Progress | None = None,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "names tokens"]]:
    """(before, after): the probability of each position's target, with all activations and with
    each named one, of a block, replaced by zeros.

    The blocks before the replaced activation are not computed again, and several ablations of one
    block are the rows of one batch.
    """
    streams = trace(model, token_ids, names=["blocks.*.stream"])
    after = torch.empty(len(names), len(targets))
    done = 0
    with evaluating(model):
        logits = model(token_ids)  # (1, tokens, vocab)
        before = target_probabilities(logits, targets, forbidden_ids)[0]
        for layer, rows in batches_of_a_block(names, len(targets) * logits.shape[2]):
            ablated = [names[row] for row in rows]
            logits = without_each(model, token_ids, streams, layer, ablated)
            after[rows] = target_probabilities(logits, targets, forbidden_ids)
            done += len(rows)
            if progress is not None:
                progress(done, len(names))
    return before, after


def batches_of_a_block(
    names: Sequence[str], logits_of_a_row: int
) -> Iterator[tuple[int, list[int]]]:
    """(block, indices into names), so many at a time as memory is to hold logits of."""
    most = max(1, MOST_LOGITS // logits_of_a_row)
    by_layer: dict[int, list[int]] = {}
    for i, name in enumerate(names):
        by_layer.setdefault(int(name.split(".")[1]), []).append(i)
    for layer, rows in by_layer.items():
        for start in range(0, len(rows), most):
            yield layer, rows[start : start + most]


def without_each(
    model: GPT2, token_ids: Tensor, streams: Trace, layer: int, names: Sequence[str]
) -> Float[Tensor, "names tokens vocab"]:
    """The logits without each of the named activations of a block.

    The first block is given the token ids: what it reads is patched where it reads it, so a stream
    that was recorded there would be patched again.
    """
    copies = len(names)
    with patched(model, {name: zero_row(row) for row, name in enumerate(names)}):
        if layer == 0 or not accepts_shortcut(model, "stream"):
            return model(token_ids.expand(copies, -1))
        stream = streams[f"blocks.{layer - 1}.stream"].expand(copies, -1, -1)
        return model(None, stream=stream, first_block=layer)


def zero_row(row: int) -> Callable[[Tensor], Tensor]:
    """A patch that replaces one row of a batch by zeros."""

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        x[row] = 0
        return x

    return edit


def target_probabilities(
    logits: Float[Tensor, "rows tokens vocab"],
    targets: Int[Tensor, " tokens"],
    forbidden_ids: Sequence[int],
) -> Float[Tensor, "rows tokens"]:
    shares = allowed(logits.float(), forbidden_ids).softmax(dim=2)  # (rows, tokens, vocab)
    columns = targets.to(shares.device).expand(len(shares), -1)[..., None]  # (rows, tokens, 1)
    return shares.gather(2, columns)[..., 0].cpu()


def allowed(logits: Float[Tensor, "*axes vocab"], forbidden_ids: Sequence[int]) -> Tensor:
    """The logits with minus infinity for tokens that cannot come next."""
    forbidden = torch.tensor(forbidden_ids, dtype=torch.long, device=logits.device)
    return logits.index_fill(-1, forbidden, FORBIDDEN)
