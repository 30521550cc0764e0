"""Forgetting: what fine-tuning has changed on general text and on what was learned.

A fine-tuned model is better on its training text than its base, and usually worse on other text.
Two figures measure it: the change of the loss on general text, and the Kullback-Leibler divergence
of the two models' predictions on any text.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gpt2mini.checks import check_predicts_tokens
from gpt2mini.data.text import Batch, Window
from gpt2mini.device import autocast
from gpt2mini.evaluation.perplexity import Perplexity, encode
from gpt2mini.evaluation.table import in_decimals
from gpt2mini.evaluation.windows import (
    check_window,
    rolling_windows,
    states_and_targets,
    text_windows,
    window_batches,
)
from gpt2mini.lora.adapt import lora_disabled
from gpt2mini.losses.chunked import logprobs_in_chunks
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating
from gpt2mini.tokenizer import Tokenizer


@dataclass(frozen=True)
class Change:
    """Two models on one text. kl: KL(tuned, base) in nats per token, 0 for equal predictions."""

    base: Perplexity
    tuned: Perplexity
    kl: float

    @property
    def loss_change(self) -> float:
        """Nats per token; positive where the tuned model is worse."""
        return self.tuned.loss - self.base.loss

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {
            "loss_base": self.base.loss,
            "loss_tuned": self.tuned.loss,
            "loss_change": self.loss_change,
            "perplexity_base": self.base.per_token,
            "perplexity_tuned": self.tuned.per_token,
            "kl_of_tuned_from_base": self.kl,
            "tokens": self.base.tokens,
        }

    def __str__(self) -> str:
        base, tuned = self.base, self.tuned
        return (
            f"{in_decimals(base.per_token):>8} -> {in_decimals(tuned.per_token):<8}   "
            f"{base.loss:6.3f} -> {tuned.loss:6.3f} {f'({self.loss_change:+.3f})':<9} "
            f"{self.kl:10.3f}"
        )


@dataclass(frozen=True)
class Forgetting:
    """The change on general text and on the new text."""

    general: Change
    new: Change

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"general": self.general.as_dict(), "new": self.new.as_dict()}

    def __str__(self) -> str:
        heading = "perplexity             loss in nats per token     KL(tuned, base)"
        return f"              {heading}\ngeneral text  {self.general}\nnew text      {self.new}"


def forgetting(
    base: GPT2 | None,
    tuned: GPT2,
    tokenizer: Tokenizer,
    general_text: str,
    new: str | Iterable[Batch],
    context_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    precision: str = "fp32",
) -> Forgetting:
    """Evaluate both models on general text and on what was learned.

    base: the model before fine-tuning; None for a model with LoRA, whose base is itself with the
    adapters disabled. new: a text; or batches, of which the labels alone count, as in training:
    the completions of `ExchangeBatches(...).in_order()`, say. Texts are cut into windows as for
    `perplexity`; positions that were not trained tell of something else than forgetting, so
    let context_length be that of the training. The divergence is KL(tuned, base) = sum of
    p_tuned * (log p_tuned - log p_base) over the vocabulary, averaged over the tokens. Every token
    after <|endoftext|> is scored once. Raises ValueError for models of different vocabularies, a
    classifier, a text that is too short, or batches without labels.
    """
    shorter = check_comparable(base, tuned)
    context_length = check_window(shorter, context_length, stride)

    def change(text: str) -> Change:
        ids = encode(tokenizer, text)
        rows = text_windows([after_eos(ids, tokenizer)], context_length, stride)
        return change_on_batches(
            base, tuned, tokenizer, window_batches(rows, batch_size), precision, text, len(ids)
        )

    if isinstance(new, str):
        return Forgetting(change(general_text), change(new))
    return Forgetting(
        change(general_text), change_on_batches(base, tuned, tokenizer, new, precision)
    )


def change_beyond(
    base: GPT2 | None,
    tuned: GPT2,
    tokenizer: Tokenizer,
    text: str,
    trained_length: int,
    batch_size: int = 4,
    precision: str = "fp32",
) -> Change | None:
    """The change of the predictions with more than `trained_length` tokens before them: positions
    at which tuning has not trained the model. None where the text or the context is too short for
    any."""
    longest = check_comparable(base, tuned).config.context_length
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.long)
    windows = rolling_windows([after_eos(ids, tokenizer)], longest)
    rows = [
        Window(row.token_ids, max(row.n_context, trained_length + 1))
        for row in windows
        if len(row.token_ids) > trained_length + 1
    ]
    if not rows:
        return None
    return change_on_batches(base, tuned, tokenizer, window_batches(rows, batch_size), precision)


def check_comparable(base: GPT2 | None, tuned: GPT2) -> GPT2:
    """The model with the shorter context. Raises ValueError for models whose predictions cannot be
    compared."""
    for model in (base or tuned, tuned):
        check_predicts_tokens(model)
    if base is not None and base.config.vocab_size != tuned.config.vocab_size:
        raise ValueError(
            f"the models have vocabularies of {base.config.vocab_size} and "
            f"{tuned.config.vocab_size} tokens: their predictions cannot be compared"
        )
    return min((base or tuned, tuned), key=lambda model: model.config.context_length)


def after_eos(ids: Int[Tensor, " tokens"], tokenizer: Tokenizer) -> Int[Tensor, " tokens_and_one"]:
    """The ids after <|endoftext|>, from which the first is predicted."""
    return torch.cat([torch.tensor([tokenizer.eos_id]), ids])


def change_on_batches(
    base: GPT2 | None,
    tuned: GPT2,
    tokenizer: Tokenizer,
    batches: Iterable[Batch],
    precision: str,
    text: str | None = None,
    tokens: int | None = None,
) -> Change:
    """`compare_predictions`, averaged over the labels of all batches.

    text and tokens: for words and bytes; the default is the text of the labels.
    """
    device, texts, scored = tuned.tok_emb.weight.device, [] if text is None else [text], 0
    sums = torch.zeros(3, dtype=torch.float64)
    with evaluating(base or tuned), evaluating(tuned), autocast(device, precision):
        for batch in (one.to(device) for one in batches):
            hidden, head, targets = states_and_targets(tuned, batch)
            with nullcontext() if base else lora_disabled(tuned):
                hidden_base, head_base, _ = states_and_targets(base or tuned, batch)
                states = (hidden_base, hidden)  # (n, emb), both
                sums += compare_predictions(states, (head_base, head), targets)
            scored += len(targets)
            if text is None:
                texts.append(tokenizer.decode(targets.tolist()))
    if not scored:
        raise ValueError("there is nothing to evaluate on: the batches contain no target")
    base_mean, tuned_mean, kl = (sums / scored).tolist()
    of_base, of_tuned = (
        Perplexity.of(mean, texts, tokens or scored, scored) for mean in (base_mean, tuned_mean)
    )
    return Change(of_base, of_tuned, kl)


def compare_predictions(
    hidden: tuple[Float[Tensor, "n emb"], Float[Tensor, "n emb_tuned"]],
    out_heads: tuple[nn.Module, nn.Module],
    targets: Int[Tensor, " n"],
    chunk_size: int = 64,
) -> Float[Tensor, "3"]:
    """(loss of base, loss of tuned, KL(tuned, base)), nats summed over the targets; in chunks."""
    sums = torch.zeros(3, dtype=torch.float64)
    chunks = (
        logprobs_in_chunks(states, head, chunk_size)
        for states, head in zip(hidden, out_heads, strict=True)
    )  # (chunk, vocab), both
    for log_base, log_tuned, target in zip(*chunks, targets.split(chunk_size), strict=True):
        kl = (log_tuned.exp() * (log_tuned - log_base)).sum()
        nats = (-log.gather(1, target[:, None]).sum() for log in (log_base, log_tuned))
        sums += torch.stack([*nats, kl]).cpu()
    return sums
