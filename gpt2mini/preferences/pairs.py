"""Preferences: a prompt with a chosen and a rejected response; records -> batches of pairs."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gpt2mini.data.batching import LengthBatches
from gpt2mini.data.instructions import (
    COMPLETION_NAMES,
    LAST_SPEAKER,
    PLAIN,
    PROMPT_NAMES,
    EncodedExchange,
    check_template,
    encode_prompt_with,
    fill,
    join,
)
from gpt2mini.data.records import Record, read_records
from gpt2mini.masking import pad_right
from gpt2mini.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

CHOSEN_NAMES = ("chosen", *COMPLETION_NAMES)  # of a column or a JSON key
KNOWN = (*PROMPT_NAMES, "input", *CHOSEN_NAMES, "rejected")


@dataclass(frozen=True)
class Preference:
    """A prompt in the model's template, and the responses chosen and rejected by a labeler."""

    prompt: str
    chosen: str
    rejected: str


# ---- records -> preferences


def read_preferences(
    source: str | Path, template: str = PLAIN, columns: Mapping[str, str] | None = None
) -> list[Preference]:
    """Read prompt, chosen and rejected, instruction (with or without input), output and rejected,
    or pairs of dialogues.

    source: .jsonl, .json, .csv or hf:owner/name:split. template: with {prompt}, or {instruction}
    and {input}; dialogues need none. Pairs of equal or empty responses are dropped, and a warning
    gives their number. Raises ValueError, with the line, for a field that is missing or empty.
    """
    check_template(template)
    pairs = [preference(record, template) for record in read_records(source, columns, KNOWN)]
    different = [one for one in pairs if one.chosen != one.rejected]
    found = [one for one in different if one.chosen.strip() and one.rejected.strip()]
    for dropped, what in (
        (len(pairs) - len(different), "both responses are the same"),
        (len(different) - len(found), "a response is empty"),
    ):
        if dropped:
            logger.warning("%s: %d of %d pairs dropped: %s", source, dropped, len(pairs), what)
    if not found:
        raise ValueError(f"{source} has no pair of two different responses")
    return found


def preference(record: Record, template: str) -> Preference:
    chosen = record.required_text(*CHOSEN_NAMES)
    rejected = record.required_text("rejected")
    if record.find(PROMPT_NAMES) is None and record.find(["chosen"]):
        return split_dialogues(chosen, rejected, record.place)
    prompt = fill(template, record.required_text(*PROMPT_NAMES), record.text("input") or "")
    return Preference(prompt, join(prompt, chosen), join(prompt, rejected))


def split_dialogues(chosen: str, rejected: str, place: str) -> Preference:
    """Two dialogues in the format of Anthropic's HH, split at the last "Assistant:" they share.

    That is the last turn of each, except in 12 of the 5103 pairs of HH's helpful test sets: there a
    response continues with turns of its own, which are not part of the prompt.
    """
    both = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (one, other) in both if one != other), min(len(chosen), len(rejected)))
    before, mark, _ = chosen[:shared].rpartition(LAST_SPEAKER)
    if not mark:
        raise ValueError(
            f"{place}: expected a prompt, or two dialogues that begin with the same text up to "
            f"{LAST_SPEAKER!r}"
        )
    prompt = before.lstrip() + mark
    responses = [dialogue[len(before + mark) :] for dialogue in (chosen, rejected)]
    return Preference(prompt, *(join(prompt, response) for response in responses))


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


def encode_preferences(
    preferences: Sequence[Preference], tokenizer: Tokenizer, longest: int
) -> list[EncodedPreference]:
    """Responses end in <|endoftext|>. Of a pair longer than `longest` tokens the prompt keeps its
    tail, the same for both responses; a response that is too long by itself keeps its head. A
    warning gives the number of such pairs."""
    found, cut_prompts, cut_responses = [], 0, 0
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
    return found


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
