"""Drafts for speculative decoding: guesses of the next tokens, by a smaller model or by lookup.

A draft may be wrong: speculative.py checks it with the model itself. A good one is cheap and often
right.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from gpt2mini.checks import check_predicts_tokens
from gpt2mini.generation_arguments import bare_model
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating
from gpt2mini.reader import Reader
from gpt2mini.responses import DraftCounts
from gpt2mini.sampling import FORBIDDEN, whole_number
from gpt2mini.token_rules import TokenRules


@dataclass(frozen=True)
class Draft:
    """Guessed next tokens of each row, and the distributions that they were drawn from."""

    token_ids: Int[Tensor, "rows drafted"]
    is_drafted: Bool[Tensor, "rows drafted"]  # False at the end of rows that have fewer
    probabilities: Float[Tensor, "rows drafted vocab"]


@runtime_checkable  # for the type checks of the tests
class Drafter(Protocol):
    """Guesses the next tokens of growing texts."""

    def draft(
        self, text: Int[Tensor, "rows tokens"], is_real: Bool[Tensor, "rows tokens"], most: int
    ) -> Draft:
        """Up to `most` next tokens of each row."""
        ...

    def advance(self, drafted: int, kept: int) -> None:
        """Told how many columns of the draft have become part of the text. One of the model's own
        follows them."""
        ...


class ModelDrafter:
    """Drafts of a smaller model, drawn by the same rules. rules: without `states`."""

    def __init__(self, model: GPT2, rows: int, capacity: int, rules: TokenRules) -> None:
        self.reader = Reader(model, rows, capacity, slide=True)
        self.rules = rules
        self.unread = 1  # columns at the end of the text that the model has not read

    def draft(
        self, text: Int[Tensor, "rows tokens"], is_real: Bool[Tensor, "rows tokens"], most: int
    ) -> Draft:
        # The window moves at the start alone: what may be taken back has to lie within it.
        most = min(most, max(1, self.reader.context // 2))
        start, distributions, is_drafted = text.shape[1], [], []
        goes_on = torch.ones(len(text), dtype=torch.bool, device=text.device)
        for left in reversed(range(most)):
            logits = self.reader.read(text, is_real, self.unread, room=left)[:, -1]  # (rows, vocab)
            allowed = self.rules.apply(logits, text, is_real)  # (rows, vocab)
            # The text may have ended in the draft, or go on otherwise: that no token is left is no
            # error yet, but the end of this row's draft.
            goes_on = goes_on & (allowed.amax(dim=1) != FORBIDDEN)
            allowed = allowed.masked_fill(~goes_on[:, None], 0)
            distributions.append(self.rules.probabilities(allowed))
            is_drafted.append(goes_on)
            text = torch.cat([text, self.rules.draw(allowed)[0][:, None]], dim=1)
            is_real = F.pad(is_real, (0, 1), value=True)
            self.unread = 1
        return Draft(
            text[:, start:], torch.stack(is_drafted, dim=1), torch.stack(distributions, dim=1)
        )

    def advance(self, drafted: int, kept: int) -> None:
        if drafted == 0:
            self.unread += 1
        elif self.reader.cache is not None:
            # It has drafted the last token and not read it: if that is kept, it comes next.
            self.unread = 2 if kept == drafted else 1
            self.reader.cache.forget(max(0, drafted - 1 - kept))


class LookupDrafter:
    """Drafts without a model: what followed the text's last tokens where they last stood before
    (Saxena 2023, "Prompt Lookup Decoding"). Texts that repeat names and phrases gain from it.
    """

    def __init__(self, longest: int, vocab_size: int) -> None:
        """longest: how many of the last tokens are looked up; if they are new, fewer are."""
        self.longest, self.vocab_size = longest, vocab_size

    def draft(
        self, text: Int[Tensor, "rows tokens"], is_real: Bool[Tensor, "rows tokens"], most: int
    ) -> Draft:
        found = [self.look_up(ids[real], most) for ids, real in zip(text, is_real, strict=True)]
        lengths = torch.tensor([len(ids) for ids in found], device=text.device)
        token_ids = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)  # (rows, drafted)
        is_drafted = torch.arange(token_ids.shape[1], device=text.device) < lengths[:, None]
        certain = F.one_hot(token_ids.long(), self.vocab_size).float()  # (rows, drafted, vocab)
        return Draft(token_ids, is_drafted, certain)

    def look_up(self, ids: Int[Tensor, " tokens"], most: int) -> Int[Tensor, " drafted"]:
        for size in range(min(self.longest, len(ids) - 1), 0, -1):
            earlier = ids[:-1].unfold(0, size, 1)  # (n-grams, size)
            places = (earlier == ids[-size:]).all(dim=1).nonzero()[:, 0]
            if len(places):
                start = int(places[-1]) + size
                return ids[start : start + most]
        return ids[:0]

    def advance(self, drafted: int, kept: int) -> None:
        pass


@dataclass(frozen=True)
class Drafting:
    """How the next tokens are guessed. Without a draft and lookup: not at all."""

    draft: GPT2 | None
    lookup: int
    draft_tokens: int
    counts: DraftCounts

    def __post_init__(self) -> None:
        for name in ("lookup", "draft_tokens"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))  # 4.0 becomes 4
        if self.draft is not None:
            object.__setattr__(self, "draft", bare_model(self.draft, "draft"))

    def check(self, model: GPT2) -> None:
        """Raise ValueError for values that make no sense with this model."""
        if self.lookup < 0 or self.draft_tokens < 1:
            raise ValueError(
                f"lookup must be 0 (off) or more and draft_tokens 1 or more, not {self.lookup} and "
                f"{self.draft_tokens}"
            )
        if self.draft is None:
            return
        if self.lookup:
            raise ValueError("drafts come from a model or from lookup, not from both: choose one")
        check_predicts_tokens(self.draft)
        sizes = self.draft.config.vocab_size, model.config.vocab_size
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the draft has a vocabulary of {sizes[0]} tokens, the model of {sizes[1]}: both "
                "must be trained with the same tokenizer"
            )
        devices = self.draft.tok_emb.weight.device, model.tok_emb.weight.device
        if devices[0] != devices[1]:
            raise ValueError(f"the draft is on {devices[0]}, the model on {devices[1]}")

    @contextmanager
    def evaluating(self, model: GPT2) -> Iterator[None]:
        """Inside, the model and the draft are in eval mode, without gradients."""
        with evaluating(model), nullcontext() if self.draft is None else evaluating(self.draft):
            yield

    def drafter(
        self,
        prompt: Int[Tensor, "rows prompt"],
        max_new_tokens: int,
        rules: TokenRules,
        vocab_size: int,
    ) -> Drafter | None:
        rows, columns = prompt.shape
        if self.draft is not None:
            capacity = columns + max_new_tokens + self.spare_columns()
            return ModelDrafter(self.draft, rows, capacity, rules)
        return LookupDrafter(self.lookup, vocab_size) if self.lookup else None

    def spare_columns(self) -> int:
        """Columns of a cache besides those of the text: for tokens that are checked."""
        return self.draft_tokens if self.draft is not None or self.lookup else 0
