"""The numbers of a model reading one text, for a page in which the model itself does not run.

`recorded.js` makes of them what a live page computes. Exact, but for the rounding of their format:

    attention weights        multiples of 1/65535
    queries, keys, values    float16; the heads' outputs follow from them and the attention weights
    vectors in a block       Euclidean norms, and the first 16 numbers in float16
    logit lens               the 5 most likely tokens after each layer
    next tokens              at temperature 1 the probabilities of the 200 most likely
    effects                  the probability of each position's target, the token that follows in
                             the text (at the end: the most likely one), without each head

Approximate: the other tokens are a histogram of 64 equal ranges of logits: how many there are, and
the logit of as many equal ones with the same sum of exp(logit). From it come their sum at other
temperatures, and what top-k and top-p keep beyond the 200. A token outside of the 200 that is not
the target has the mean probability of these others.
"""

import base64
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gpt2mini.inspection.ablation import Progress, ablation_effects, allowed
from gpt2mini.inspection.explorer.block_steps import Step, complete_steps, observed_steps
from gpt2mini.inspection.lens import logit_lens
from gpt2mini.inspection.tracing import Trace, trace
from gpt2mini.model import GPT2

FIRST_VALUES = 16
MOST_LIKELY = 200
BINS = 64
MOST_PARAMETERS_FOR_EFFECTS = 200_000_000  # beyond, a pass without each head takes too long
# The vectors of a block in the order of its forward pass.
STEPS = (
    *("before", "norm1", "query", "key", "value", "context", "attn_out"),
    *("middle", "norm2", "hidden", "mlp_out", "stream"),
)


def recorded_numbers(
    model: GPT2,
    token_ids: Int[Tensor, "1 tokens"],
    forbidden_ids: list[int],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """All that the page shows of this text, ready for JSON.

    progress: is told how many of the passes for the effects are done.
    Raises ValueError for activations that `trace` cannot observe and for any that are not finite.
    """
    steps: list[Step] = [{} for _ in model.trf_blocks]
    with observed_steps(model, steps):
        found = trace(model, token_ids)
    check_activations(found)
    complete_steps(steps, found, model.config.n_heads)
    logits = allowed(found["logits"][0].float(), forbidden_ids).cpu()  # (tokens, vocab)
    targets = torch.cat([token_ids[0, 1:].cpu(), logits[-1:].argmax(dim=1)])  # (tokens)
    lens = logit_lens(model, token_ids, k=5, forbidden_ids=forbidden_ids)
    return {
        "token_ids": token_ids[0].tolist(),
        "attention": packed_attention(found),
        **{name: packed(rows_of(steps, name), "<f2") for name in ("query", "key", "value")},
        "steps": packed_steps(steps),
        "embedding_norms": packed(found["embedding"][0].norm(dim=1), "<f4"),
        "lens": {
            "ids": packed(lens.token_ids[:, 0], "<i4"),  # (layers + 1, tokens, 5)
            "probabilities": packed(lens.probabilities[:, 0], "<f4"),
        },
        "next": next_tokens(logits, targets),
        "effects": effects(model, token_ids, targets, forbidden_ids, progress),
    }


def packed(numbers: Tensor | np.ndarray, dtype: str) -> dict[str, Any]:
    """An array for JSON. float16 becomes float32 where a number is beyond its range."""
    array = np.asarray(numbers.detach().float().cpu() if isinstance(numbers, Tensor) else numbers)
    if dtype == "<f2" and np.abs(array).max(initial=0) > np.finfo(np.float16).max:
        dtype = "<f4"
    stored = array.astype(dtype)
    data = base64.b64encode(stored.tobytes()).decode()
    return {"dtype": dtype, "shape": list(stored.shape), "data": data}


def check_activations(found: Trace) -> None:
    """Raise ValueError for an activation with a number that is not finite."""
    for name in found:
        if not found[name].isfinite().all():
            raise ValueError(
                f"{name} has numbers that are not finite (NaN or infinity) on this text: there is "
                "nothing to show"
            )


# ---- the vectors of each block


def rows_of(steps: list[Step], name: str) -> Float[Tensor, "layers tokens width"]:
    return torch.stack([step[name] for step in steps])


def packed_steps(steps: list[Step]) -> dict[str, Any]:
    """For each of STEPS the vectors' size, norms (layers, tokens) and first numbers (layers,
    tokens, 16 or fewer); null for what a block of your own does not have."""
    return {
        name: {
            "size": steps[0][name].shape[1],
            "norms": packed(rows_of(steps, name).float().norm(dim=2), "<f4"),
            "values": packed(rows_of(steps, name)[..., :FIRST_VALUES], "<f2"),
        }
        if all(name in step for step in steps)
        else None
        for name in STEPS
    }


def packed_attention(found: Trace) -> dict[str, Any]:
    """Weights times 65535 as 16-bit integers, (layers, heads, pairs): row by row, each up to the
    diagonal."""
    layers = torch.stack(found.of_each_block("attention"))[:, 0].cpu()  # (layers, heads, t, t)
    rows, columns = torch.tril_indices(*layers.shape[2:])
    return packed((layers[:, :, rows, columns] * 65535).round(), "<u2")


# ---- the next tokens


def next_tokens(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> dict[str, Any]:
    """The most likely tokens at each position, those that follow, and a histogram of the others.

    Minus infinity stands for a token that cannot come next.
    """
    possible = int(logits[0].isfinite().sum())
    best = logits.topk(min(MOST_LIKELY, possible), dim=1)  # (tokens, 200)
    others = logits.scatter(1, best.indices, -torch.inf)  # (tokens, vocab)
    rows = [histogram(row[row.isfinite()].numpy()) for row in others]
    counts, other_logits = (np.stack(parts) for parts in zip(*rows, strict=True))
    return {
        "ids": packed(best.indices, "<i4"),
        "logits": packed(best.values, "<f4"),
        "targets": targets.tolist(),
        "target_logits": packed(logits.gather(1, targets[:, None])[:, 0], "<f4"),
        "other_counts": packed(counts, "<f4"),  # (tokens, 64), the likeliest first
        "other_logits": packed(other_logits, "<f4"),
    }


def histogram(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(how many, their logit) in each of 64 equal ranges of logits, the highest first."""
    if len(logits) == 0:
        return np.zeros(BINS), np.zeros(BINS)
    edges = np.linspace(logits.min(), logits.max(), BINS + 1)[1:-1]
    place = BINS - 1 - np.digitize(logits, edges)
    counts = np.bincount(place, minlength=BINS)
    powers = np.exp(logits.astype(np.float64) - logits.max())
    sums = np.bincount(place, powers, minlength=BINS)
    means = np.divide(sums, counts, out=np.ones(BINS), where=counts > 0)
    return counts, np.log(np.maximum(means, np.finfo(np.float64).tiny)) + logits.max()


# ---- effects


def effects(
    model: GPT2,
    token_ids: Int[Tensor, "1 tokens"],
    targets: Int[Tensor, " tokens"],
    forbidden_ids: list[int],
    progress: Progress | None,
) -> dict[str, Any]:
    """The probability of each position's target with everything (tokens), and without each head
    (layers, heads, tokens)."""
    if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS_FOR_EFFECTS:
        return {"note": "not computed: the model has more than 200 million parameters"}
    layers, heads = range(model.config.n_layers), range(model.config.n_heads)
    names = [f"blocks.{layer}.head.{head}" for layer in layers for head in heads]
    before, after = ablation_effects(model, token_ids, names, targets, forbidden_ids, progress)
    return {"note": "", "before": packed(before, "<f4"), "heads": packed(after, "<f4")}
