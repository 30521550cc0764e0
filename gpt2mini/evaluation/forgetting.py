"""What has a model forgotten by learning? Before and after, on general prose and on the new text.

A fine-tuned model is better at its new text than the model it came from, and most often worse at
everything else. Two figures say how much: the change of the loss on general prose, and how far its
predictions have moved on any text, whether for better or worse (the Kullback-Leibler divergence).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gpt2mini.checks import check_predicts_tokens
from gpt2mini.data.text import pad_windows, sliding_windows
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
    """Two models on one text. kl: KL(tuned, base), nats per token: 0 if they predict the same."""

    base: Perplexity
    tuned: Perplexity
    kl: float

    @property
    def loss_change(self) -> float:
        """Nats per token; above 0 the tuned model is the worse one."""
        return self.tuned.loss - self.base.loss


@dataclass(frozen=True)
class Forgetting:
    """The change on general prose and on the new text."""

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
    """Both models on both texts, in windows as for `perplexity`.

    base: the model before; None for a tuned model with LoRA, whose base is itself without adapters.
    The divergence is KL(tuned, base) = sum of p_tuned * (log p_tuned - log p_base) over the whole
    vocabulary, its mean over the tokens: nats that somebody who expects the base would lose.
    Raises ValueError for models of different vocabularies, a classifier, or a text that is too
    short.
    """
    for model in (base or tuned, tuned):
        check_predicts_tokens(model)
    if base is not None and base.config.vocab_size != tuned.config.vocab_size:
        raise ValueError(
            f"the models have vocabularies of {base.config.vocab_size} and "
            f"{tuned.config.vocab_size} tokens: their predictions cannot be compared"
        )
    shorter = min((base or tuned, tuned), key=lambda model: model.config.context_length)
    window = window_and_stride(shorter, context_length, stride)
    general, new = (
        compare(base, tuned, tokenizer, text, window, batch_size, precision)
        for text in (general_text, new_text)
    )
    return Forgetting(general, new)


def compare(
    base: GPT2 | None,
    tuned: GPT2,
    tokenizer: Tokenizer,
    text: str,
    window: tuple[int, int],
    batch_size: int,
    precision: str,
) -> Change:
    """Both models on one text; every token from <|endoftext|> on is scored once."""
    ids = encode(tokenizer, text)
    rows = sliding_windows([torch.cat([torch.tensor([tokenizer.eos_id]), ids])], *window)
    sums = torch.zeros(3, dtype=torch.float64)  # nats of base, nats of tuned, divergence
    device = tuned.tok_emb.weight.device
    reading = nullcontext() if base is None else evaluating(base)
    with evaluating(tuned), reading, autocast(device, precision):
        for first in range(0, len(rows), batch_size):
            batch = pad_windows(rows[first : first + batch_size]).to(device)
            targets = next_tokens(batch.labels)  # (batch, tokens - 1)
            asked = targets != IGNORED
            inputs = batch.token_ids, batch.attention_mask
            hidden_tuned, head_tuned = hidden_states_and_head(tuned, *inputs)
            with base_of(base, tuned) as before:
                hidden_base, head_base = hidden_states_and_head(before, *inputs)
                states = (hidden_base[:, :-1][asked], hidden_tuned[:, :-1][asked])
                sums += surprises(states, (head_base, head_tuned), targets[asked]).cpu()
    scored = sum(row.n_scored for row in rows)
    base_mean, tuned_mean, kl = (sums / scored).tolist()
    return Change(
        Perplexity.of(base_mean, [text], [ids], rows),
        Perplexity.of(tuned_mean, [text], [ids], rows),
        kl,
    )


@contextmanager
def base_of(base: GPT2 | None, tuned: GPT2) -> Iterator[GPT2]:
    """The model before; without one, the tuned model with its adapters off."""
    if base is not None:
        yield base
    else:
        with lora_disabled(tuned):
            yield tuned


def surprises(
    hidden: tuple[Float[Tensor, "n emb"], Float[Tensor, "n emb_tuned"]],
    out_heads: tuple[nn.Module, nn.Module],
    targets: Int[Tensor, " n"],
    chunk_size: int = 64,
) -> Float[Tensor, "3"]:
    """(nats of base, nats of tuned, divergence), summed; the logits exist for a chunk at a time."""
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
