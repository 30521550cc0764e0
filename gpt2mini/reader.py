"""Reads a growing text with a cache: each call computes the new tokens alone."""

import functools

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gpt2mini.cache import KeyValueCache
from gpt2mini.checks import check_cache_is_filled
from gpt2mini.kernels import decoding_kernels
from gpt2mini.masking import align_right, pad_left
from gpt2mini.model import GPT2, accepts_shortcut


class Reader:
    """Gives the logits of a growing text's next tokens; the model reads only new tokens.

    capacity: columns of the longest text. slide: forget the older half of a row that outgrows the
    context, and read the newer half again. copies: so many neighboring rows begin with the same
    prompt, which is read once.
    """

    def __init__(self, model: GPT2, rows: int, capacity: int, slide: bool, copies: int = 1) -> None:
        self.model, self.slide, self.copies = model, slide, copies
        # Found out once for each number of columns: it looks at every layer.
        self.kernels = functools.cache(lambda new: decoding_kernels(model, rows * new))
        self.context = model.config.context_length
        self.capacity = min(capacity, self.context) if slide else capacity
        self.cache: KeyValueCache | None = None
        self.forgotten: Int[Tensor, " rows"] | int = 0  # real tokens before each row's window

    def read(
        self,
        text: Int[Tensor, "rows tokens"],
        is_real: Bool[Tensor, "rows tokens"],
        new: int = 1,
        room: int = 0,
    ) -> Float[Tensor, "rows outputs vocab"]:
        """The logits after each of the last `new` columns, which this reader has not yet read and
        which have no padding. The first time it reads all of the text, and gives the logits after
        the last column. room: if need be it slides now, so that it need not for so many more."""
        if self.cache is None:
            if self.slide:
                text, is_real = self.windows(text, is_real, self.context - room, room)
            return self.prefill(text, is_real, self.copies)[:, None].float()  # (rows, 1, vocab)
        if self.cache.length + new + room > self.cache.max_tokens:  # only when sliding
            text, is_real = self.windows(text, is_real, max(1, self.context // 2), room)
            return self.prefill(text, is_real)[:, None].float()  # (rows, 1, vocab)
        with self.kernels(new):
            return self.model(text[:, -new:], cache=self.cache).float()  # (rows, new, vocab)

    def room(self, is_real: Bool[Tensor, "rows tokens"]) -> int:
        """How many tokens every row can be given before one outgrows the context."""
        return self.context - int((is_real.sum(dim=1) - self.forgotten).max())

    def windows(
        self,
        text: Int[Tensor, "rows tokens"],
        is_real: Bool[Tensor, "rows tokens"],
        longest: int,
        room: int = 0,
    ) -> tuple[Int[Tensor, "rows columns"], Bool[Tensor, "rows columns"]]:
        """The tokens of each row that the model reads: its window and all later tokens, or, where
        they and `room` more exceed the context, the last `longest` of them.

        Only real tokens count, as if each row were alone. All rows end in the last column, so the
        cache is full exactly when the longest window fills the context.
        """
        length = is_real.sum(dim=1)  # (rows)
        window = length - self.forgotten  # (rows)
        window = torch.where(window + room > self.context, longest, window)
        self.forgotten = length - window
        rows = zip(text, is_real, window.tolist(), strict=True)
        return pad_left([ids[real][-columns:] for ids, real, columns in rows])

    def prefill(
        self,
        text: Int[Tensor, "rows columns"],
        is_real: Bool[Tensor, "rows columns"],
        copies: int = 1,
    ) -> Float[Tensor, "rows vocab"]:
        """Fill a new cache with the text; the logits of each row's last token. copies: the rows are
        so many copies of each text."""
        text, is_real = text[::copies], is_real[::copies]
        weight, columns = self.model.tok_emb.weight, text.shape[1]
        cache = KeyValueCache(
            self.model.config,
            len(text),
            self.capacity if copies == 1 else columns,
            weight.device,
            cache_dtype(weight),
        )
        mask = None if is_real.all() else is_real
        logits = last_token_logits(self.model, text, mask, cache)
        check_cache_is_filled(cache, columns)
        if copies > 1:
            cache = cache.repeated(copies, self.capacity)
        self.cache = cache
        return logits.repeat_interleave(copies, dim=0)


def last_token_logits(
    model: GPT2,
    token_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
    cache: KeyValueCache | None = None,
) -> Float[Tensor, "batch vocab"]:
    """The logits at the last real token of each row, on whichever side the padding stands."""
    if attention_mask is not None:
        token_ids, attention_mask = align_right(token_ids, attention_mask)
    shortcut = {"last_only": True} if accepts_shortcut(model, "last_only") else {}
    return model(token_ids, attention_mask, cache=cache, **shortcut)[:, -1]


def cache_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which attention computes: autocast's if it is on, else the weights'."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
