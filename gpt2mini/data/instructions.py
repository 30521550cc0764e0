"""Prompts and completions for supervised fine-tuning: exchanges -> token ids and labels, padded or
packed. (`data.exchanges` reads them from records, `data.templates` says how prompts are written.)

The model reads prompt and completion as one text. The loss counts only the tokens of the
completion and the <|endoftext|> after it, so that a tuned model learns to stop.
"""

import logging
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from gpt2mini.data.batching import LengthBatches, length_buckets
from gpt2mini.data.exchanges import Exchange, read_exchanges
from gpt2mini.data.templates import ALPACA, PLAIN, TEMPLATES, check_template, fill
from gpt2mini.data.text import Batch
from gpt2mini.masking import IGNORED, pad_right
from gpt2mini.tokenizer import END_OF_TEXT, Tokenizer

__all__ = [
    "ALPACA",
    "PLAIN",
    "TEMPLATES",
    "EncodedExchange",
    "Exchange",
    "ExchangeBatches",
    "check_template",
    "encode_exchanges",
    "encode_prompt_with",
    "fill",
    "pack",
    "read_exchanges",
    "segment_ids_of",
    "warn_of_special_tokens",
]

logger = logging.getLogger(__name__)


# ---- exchanges -> token ids


@dataclass(frozen=True)
class EncodedExchange:
    """Token ids of prompt, completion and <|endoftext|>; the first `n_prompt` are the prompt."""

    token_ids: Int[Tensor, " tokens"]
    n_prompt: int

    def labels(self, train_on: str = "completion") -> Int[Tensor, " tokens"]:
        """train_on: "completion", or "all" tokens but the first, which has no context."""
        labels = self.token_ids.clone()
        labels[: self.n_prompt if train_on == "completion" else 1] = IGNORED
        return labels


def encode_exchanges(
    exchanges: Sequence[Exchange], tokenizer: Tokenizer, longest: int
) -> list[EncodedExchange]:
    """Prompt and completion are encoded separately, as in generation.

    Of an exchange longer than `longest` tokens the prompt keeps its tail; a completion that is too
    long by itself keeps its head. A warning gives the number of such exchanges.
    """
    found, cut_prompts, cut_completions = [], 0, 0
    warn_of_special_tokens((one.prompt for one in exchanges), tokenizer)
    for one in exchanges:
        encoded, cut_prompt, cut_completion = encode_prompt_with(
            [one.completion], one.prompt, tokenizer, longest
        )
        found += encoded
        cut_prompts += cut_prompt
        cut_completions += cut_completion
    for count, what, kept in (
        (cut_prompts, "prompts", "tail"),
        (cut_completions, "completions", "head"),
    ):
        if count:
            logger.warning(
                "%d of %d %s did not fit %d tokens: their %s was kept",
                count, len(found), what, longest, kept,
            )  # fmt: skip
    return found


def warn_of_special_tokens(prompts: Iterable[str], tokenizer: Tokenizer) -> None:
    """Name the special tokens that a template or a record writes out: here they are text, as
    <|endoftext|> in a record must be, where plain text and `generate --allow-special` have tokens.
    """
    special = {one.content for one in tokenizer.added_tokens.tokens.values() if one.special}
    special -= {END_OF_TEXT}
    found = {token for prompt in prompts for token in special if token in prompt} if special else ()
    if found:
        message = (
            "the prompts hold %s as text, not as the special tokens of the vocabulary: write such "
            'dialogues whole, as {"text": ...}, where they are tokens'
        )
        logger.warning(message, ", ".join(sorted(found)))


def encode_prompt_with(
    completions: Sequence[str], prompt: str, tokenizer: Tokenizer, longest: int
) -> tuple[list[EncodedExchange], bool, bool]:
    """(the prompt with each completion, whether the prompt was cut, whether a completion was).

    The prompt is cut to the room beside the longest completion, the same for all of them.
    """
    if longest < 2:
        raise ValueError(f"longest must be at least 2 (prompt and completion), not {longest}")
    encoded = [[*tokenizer.encode(text), tokenizer.eos_id] for text in completions]
    cut_completion = any(len(ids) > longest - 1 for ids in encoded)
    encoded = [ids[: longest - 1] for ids in encoded]
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    room = longest - max(map(len, encoded))
    kept = prompt_ids[-room:]
    found = [EncodedExchange(torch.tensor(kept + ids), len(kept)) for ids in encoded]
    return found, len(prompt_ids) > room, cut_completion


# ---- token ids -> batches


class ExchangeBatches(LengthBatches):
    """Shuffled batches, determined by the seed; iterating over them is one epoch.

    packed: several exchanges share a row of at most `longest` tokens, with segment ids as attention
    mask, so that none attends to another. Otherwise each has its own row, in batches of similar
    length.
    """

    def __init__(
        self,
        encoded: Sequence[EncodedExchange],
        batch_size: int,
        seed: int,
        train_on: str = "completion",
        packed: bool = False,
        longest: int = 0,
    ) -> None:
        if train_on not in ("completion", "all"):
            raise ValueError(f"train_on must be 'completion' or 'all', not {train_on!r}")
        self.encoded, self.train_on = list(encoded), train_on
        lengths = [len(one.token_ids) for one in self.encoded]
        singles = [[i] for i in range(len(lengths))]
        self.rows = pack(lengths, max([longest, *lengths])) if packed else singles
        super().__init__([sum(lengths[i] for i in row) for row in self.rows], batch_size, seed)

    def in_order(self) -> Iterator[Batch]:
        """Every exchange once, longest rows first, for validation."""
        order = sorted(range(len(self.rows)), key=lambda row: -self.lengths[row])
        for start in range(0, len(order), self.batch_size):
            yield self.batch(order[start : start + self.batch_size])

    def batch(self, indices: Sequence[int]) -> Batch:
        members = [[self.encoded[i] for i in self.rows[row]] for row in indices]
        token_ids = [torch.cat([one.token_ids for one in row]) for row in members]
        labels = [torch.cat([one.labels(self.train_on) for one in row]) for row in members]
        segments = [segment_ids_of([len(one.token_ids) for one in row]) for row in members]
        padded_ids, is_real = pad_right(token_ids)  # (batch, tokens), both
        padded_labels = pad_right(labels)[0].masked_fill(~is_real, IGNORED)  # (batch, tokens)
        mask = pad_right(segments)[0]  # (batch, tokens)
        return Batch(padded_ids, padded_labels, None if (mask == 1).all() else mask)

    @property
    def padding_share(self) -> float:
        """The share of padding among all positions of an epoch's batches."""
        generator = np.random.default_rng((self.seed, 0))
        positions = sum(
            len(rows) * max(self.lengths[row] for row in rows)
            for rows in length_buckets(self.lengths, self.batch_size, generator)
        )
        return 1 - sum(self.lengths) / positions


def segment_ids_of(lengths: Sequence[int]) -> Int[Tensor, " tokens"]:
    """1 1 1 2 2 for lengths of 3 and 2: segment ids of texts that share a row."""
    return torch.arange(1, len(lengths) + 1).repeat_interleave(torch.tensor(lengths))


def pack(lengths: Sequence[int], longest: int) -> list[list[int]]:
    """Indices of the texts in each row of at most `longest` tokens: best-fit decreasing, which puts
    the longest texts first, each into the fullest row with room for it."""
    rows: list[list[int]] = []
    with_room: list[tuple[int, int]] = []  # (free positions, row), the fullest first
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        best = bisect_left(with_room, (lengths[i], 0))
        if best < len(with_room):
            free, row = with_room.pop(best)
            rows[row].append(i)
        else:
            free, row = longest, len(rows)
            rows.append([i])
        insort(with_room, (free - lengths[i], row))
    return rows
