"""Preferences -> batches of pairs, chosen and rejected responses side by side."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gpt2mini.data.batching import LengthBatches
from gpt2mini.data.instructions import (
    EncodedExchange,
    encode_prompt_with,
    warn_of_special_tokens,
)
from gpt2mini.masking import pad_right
from gpt2mini.preferences.reading import Preference, read_preferences
from gpt2mini.tokenizer import Tokenizer

__all__ = [
    "EncodedPreference",
    "Preference",
    "PreferenceBatch",
    "PreferenceBatches",
    "encode_preferences",
    "pad_pairs",
    "read_preferences",
]

logger = logging.getLogger(__name__)

# ---- preferences -> token ids


@dataclass(frozen=True)
class EncodedPreference:
    """Token ids of the prompt with either response."""

    chosen: EncodedExchange
    rejected: EncodedExchange
    reference: tuple[float, float] | None = None  # log p(chosen), log p(rejected)

    @property
    def length(self) -> int:
        return max(len(self.chosen.token_ids), len(self.rejected.token_ids))

    @property
    def response_lengths(self) -> tuple[int, int]:
        """Tokens of the responses, <|endoftext|> included."""
        chosen, rejected = self.chosen, self.rejected
        return len(chosen.token_ids) - chosen.n_prompt, len(rejected.token_ids) - rejected.n_prompt


def encode_preferences(
    preferences: Sequence[Preference], tokenizer: Tokenizer, longest: int
) -> list[EncodedPreference]:
    """Responses end in <|endoftext|>. Of a pair longer than `longest` tokens the prompt keeps its
    tail, the same for both responses; a response that is too long by itself keeps its head. A
    warning gives the number of such pairs. Pairs that are equal after the cut teach nothing and are
    left out, with a warning. Raises ValueError if no pair is left."""
    found, cut_prompts, cut_responses = [], 0, 0
    warn_of_special_tokens((one.prompt for one in preferences), tokenizer)
    for one in preferences:
        (chosen, rejected), cut_prompt, cut_response = encode_prompt_with(
            [one.chosen, one.rejected], one.prompt, tokenizer, longest
        )
        found.append(EncodedPreference(chosen, rejected))
        cut_prompts += cut_prompt
        cut_responses += cut_response
    for count, kept in (
        (cut_prompts, "the tail of the prompt"),
        (cut_responses, "the head of a response"),
    ):
        if count:
            message = "%d of %d pairs did not fit %d tokens: %s was kept"
            logger.warning(message, count, len(found), longest, kept)
    return without_equal_pairs(found, longest)


def without_equal_pairs(
    pairs: Sequence[EncodedPreference], longest: int
) -> list[EncodedPreference]:
    different = [x for x in pairs if not torch.equal(x.chosen.token_ids, x.rejected.token_ids)]
    if pairs and not different:
        raise ValueError(f"no pair differs within {longest} tokens: allow more of them")
    if len(different) < len(pairs):
        message = "%d of %d pairs are the same within %d tokens and were left out"
        logger.warning(message, len(pairs) - len(different), len(pairs), longest)
    return different


# ---- token ids -> batches


@dataclass(frozen=True)
class PreferenceBatch:
    """All chosen responses, then all rejected ones, for one forward pass.

    `rows` is 2 * pairs; `tensor.chunk(2)` separates them.
    """

    token_ids: Int[Tensor, "rows tokens"]
    response_mask: Bool[Tensor, "rows tokens"]  # <|endoftext|> included
    attention_mask: Bool[Tensor, "rows tokens"] | None = None  # None: no padding
    reference_logprobs: Float[Tensor, " rows"] | None = None

    def to(self, device: torch.device) -> "PreferenceBatch":
        mask, reference = self.attention_mask, self.reference_logprobs
        return PreferenceBatch(
            self.token_ids.to(device),
            self.response_mask.to(device),
            None if mask is None else mask.to(device),
            None if reference is None else reference.to(device),
        )


def pad_pairs(pairs: Sequence[EncodedPreference]) -> PreferenceBatch:
    """Right-pad to the longest row; masks come from lengths."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    token_ids, is_real = pad_right([row.token_ids for row in rows])  # (rows, tokens), both
    n_prompt = torch.tensor([[row.n_prompt] for row in rows])  # (rows, 1)
    is_response = is_real & (torch.arange(token_ids.shape[1]) >= n_prompt)  # (rows, tokens)
    known = [pair.reference for pair in pairs if pair.reference is not None]
    reference = torch.tensor(known).T.flatten() if len(known) == len(pairs) else None  # (rows)
    return PreferenceBatch(token_ids, is_response, None if is_real.all() else is_real, reference)


class PreferenceBatches(LengthBatches):
    """Shuffled batches of pairs of similar length, determined by the seed; iterating over them is
    one epoch."""

    def __init__(self, pairs: Sequence[EncodedPreference], batch_size: int, seed: int) -> None:
        self.pairs = list(pairs)
        super().__init__([pair.length for pair in self.pairs], batch_size, seed)

    def batch(self, indices: Sequence[int]) -> PreferenceBatch:
        return pad_pairs([self.pairs[i] for i in indices])
