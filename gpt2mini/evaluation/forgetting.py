"""Forgetting: what fine-tuning has changed on general text and on the new text.

A fine-tuned model is better on its training text than its base, and usually worse on other text.
Two figures measure it: the change of the loss on general text, and the Kullback-Leibler divergence
of the two models' predictions on any text.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gpt2mini.checks import check_predicts_tokens
from gpt2mini.data.text import Window, pad_windows, sliding_windows
from gpt2mini.device import autocast
from gpt2mini.evaluation.perplexity import Perplexity, encode, window_and_stride
from gpt2mini.lora.adapt import lora_disabled
from gpt2mini.losses.chunked import logprobs_in_chunks
from gpt2mini.losses.deferred import hidden_states_and_head
from gpt2mini.losses.next_token import next_tokens
from gpt2mini.masking import IGNORED
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


@dataclass(frozen=True)
class Forgetting:
    """The change on general text and on the new text."""

    general: Change
    new: Change

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            name: {
                "loss_base": change.base.loss,
                "loss_tuned": change.tuned.loss,
                "loss_change": change.loss_change,
                "perplexity_base": change.base.per_token,
                "perplexity_tuned": change.tuned.per_token,
                "kl_of_tuned_from_base": change.kl,
                "tokens": change.base.tokens,
            }
            for name, change in (("general", self.general), ("new", self.new))
        }

    def __str__(self) -> str:
        lines = [
            "              perplexity             loss in nats per token          KL(tuned, base)"
        ]
        for name, change in (("general text", self.general), ("new text", self.new)):
            base, tuned = change.base, change.tuned
            lines.append(
                f"{name:12}  {base.per_token:8.2f} -> {tuned.per_token:<8.2f}   "
                f"{base.loss:6.3f} -> {tuned.loss:6.3f} ({change.loss_change:+.3f})   "
                f"{change.kl:9.3f}"
            )
        return "\n".join(lines)


def forgetting(
    base: GPT2 | None,
    tuned: GPT2,
    tokenizer: Tokenizer,
    general_text: str,
    new_text: str,
    context_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    precision: str = "fp32",
) -> Forgetting:
    """Evaluate both models on both texts, in windows as for `perplexity`.

    base: the model before fine-tuning; None for a model with LoRA, whose base is itself with the
    adapters disabled. The divergence is KL(tuned, base) = sum of p_tuned * (log p_tuned - log
    p_base) over the vocabulary, averaged over the tokens. Every token after <|endoftext|> is scored
    once. Raises ValueError for models of different vocabularies, a classifier, or a text that is
    too short.
    """
    for model in (base or tuned, tuned):
        check_predicts_tokens(model)
    if base is not None and base.config.vocab_size != tuned.config.vocab_size:
        raise ValueError(
            f"the models have vocabularies of {base.config.vocab_size} and "
            f"{tuned.config.vocab_size} tokens: their predictions cannot be compared"
        )
    shorter = min((base or tuned, tuned), key=lambda model: model.config.context_length)
    context_length, stride = window_and_stride(shorter, context_length, stride)

    def change(text: str) -> Change:
        ids = encode(tokenizer, text)
        first = torch.tensor([tokenizer.eos_id])
        rows = sliding_windows([torch.cat([first, ids])], context_length, stride)
        sums = sum_over_windows(base, tuned, rows, batch_size, precision)  # (3)
        base_mean, tuned_mean, kl = (sums / sum(row.n_scored for row in rows)).tolist()
        of_mean = partial(Perplexity.of, texts=[text], encoded=[ids], rows=rows)
        return Change(of_mean(base_mean), of_mean(tuned_mean), kl)

    return Forgetting(change(general_text), change(new_text))


def sum_over_windows(
    base: GPT2 | None, tuned: GPT2, rows: Sequence[Window], batch_size: int, precision: str
) -> Float[Tensor, "3"]:
    """`compare_predictions`, summed over all scored tokens."""
    device = tuned.tok_emb.weight.device
    sums = torch.zeros(3, dtype=torch.float64)
    with evaluating(base or tuned), evaluating(tuned), autocast(device, precision):
        for first in range(0, len(rows), batch_size):
            batch = pad_windows(rows[first : first + batch_size]).to(device)
            targets = next_tokens(batch.labels)  # (batch, tokens - 1)
            scored = targets != IGNORED
            inputs = batch.token_ids, batch.attention_mask
            hidden, head = hidden_states_and_head(tuned, *inputs)
            with nullcontext() if base else lora_disabled(tuned):
                hidden_base, head_base = hidden_states_and_head(base or tuned, *inputs)
                states = (hidden_base[:, :-1][scored], hidden[:, :-1][scored])  # (n, emb), both
                sums += compare_predictions(states, (head_base, head), targets[scored])
    return sums


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
