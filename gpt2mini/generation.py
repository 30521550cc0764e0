"""Generation: prefill the prompt, decode token by token, stream text.

`generate` works on token ids, in batches; `complete` and `stream` on text. All of them use the
key/value cache and call the model itself. They restore the model's mode and keep no gradients.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gpt2mini.cache import KeyValueCache
from gpt2mini.checks import check_cache_is_filled, check_generation_request
from gpt2mini.kernels import decoding_kernels
from gpt2mini.masking import align_right, pad_left
from gpt2mini.model import GPT2, accepts_shortcut
from gpt2mini.modes import evaluating
from gpt2mini.sampling import (
    FORBIDDEN,
    divide_by_temperature,
    draw,
    forbid_repeated_ngrams,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)
from gpt2mini.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The rules apply in the order in which they stand here."""

    repetition_penalty: float = 1.0  # above 1: tokens already in the text become less likely
    no_repeat_ngram_size: int = 0  # n above 0: no n tokens in a row appear twice
    temperature: float = 1.0  # below 1: sharper; above 1: flatter; 0: the most likely (greedy)
    top_k: int | None = None  # choose among the k most likely
    top_p: float | None = None  # choose among the fewest whose probabilities add up to p

    def __post_init__(self) -> None:
        for holds, rule in (
            (self.repetition_penalty > 0, "repetition_penalty must be above 0 (1 changes nothing)"),
            (self.no_repeat_ngram_size >= 0, "no_repeat_ngram_size must be 0 (off) or more"),
            (0 <= self.temperature < float("inf"), "temperature must be 0 (greedy) or more"),
            (self.top_k is None or self.top_k >= 1, "top_k must be at least 1"),
            (self.top_p is None or 0 < self.top_p <= 1, "top_p must lie in (0, 1]"),
        ):
            if not holds:
                raise ValueError(f"{rule}; got {self}")

    def choose(
        self,
        logits: Float[Tensor, "rows vocab"],
        token_ids: Int[Tensor, "rows tokens"],
        is_real: Bool[Tensor, "rows tokens"],
        generator: torch.Generator | None,
    ) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
        """(next token of each row, its log-probability after all rules), given the text so far."""
        if self.repetition_penalty != 1.0:
            logits = penalize_repetition(logits, token_ids, is_real, self.repetition_penalty)
        if self.no_repeat_ngram_size:
            logits = forbid_repeated_ngrams(logits, token_ids, is_real, self.no_repeat_ngram_size)
            if (logits == FORBIDDEN).all(dim=1).any():
                raise ValueError("every token would repeat an n-gram: raise no_repeat_ngram_size")
        if self.temperature > 0:
            logits = divide_by_temperature(logits, self.temperature)
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        return draw(logits, self.temperature, generator)


@dataclass(frozen=True)
class Generated:
    """What `generate` returns. All tensors have one shape, (rows, prompt + new): column for
    column."""

    token_ids: Int[Tensor, "rows tokens"]  # a finished row repeats its last token
    attention_mask: Bool[Tensor, "rows tokens"]  # real tokens: the prompt's and the response's
    response_mask: Bool[Tensor, "rows tokens"]  # generated tokens, the stop token included
    logprobs: Float[Tensor, "rows tokens"]  # of the response tokens under the model itself; else 0
    sampling_logprobs: Float[Tensor, "rows tokens"]  # the same after temperature, top-k and so on


def generate(
    model: GPT2,
    token_ids: Int[Tensor, "batch tokens"],
    max_new_tokens: int,
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    stop_ids: Sequence[int] = (),
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    overflow: str = "error",
) -> Generated:
    """Continue each row by up to `max_new_tokens` tokens; a row ends early at any of `stop_ids`.

    attention_mask: 0 for padding, on either side of a prompt. num_samples: continuations of each
    prompt, in neighboring rows. overflow: what to do when a row outgrows the context; "error", or
    "slide": forget its older half and read the newer half again (GPT-2's positions are absolute, so
    a window cannot move without that). Several threads may share a model that is in eval mode.
    Raises ValueError for settings that make no sense.
    """
    sampling = Sampling(repetition_penalty, no_repeat_ngram_size, temperature, top_k, top_p)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    token_ids = token_ids.repeat_interleave(num_samples, dim=0)  # (rows, prompt)
    if attention_mask is not None:
        attention_mask = attention_mask.repeat_interleave(num_samples, dim=0)
    with evaluating(model):  # once, not for each token: it visits every layer
        steps = list(
            generation_steps(
                model,
                token_ids,
                max_new_tokens,
                attention_mask,
                sampling,
                stop_ids,
                generator,
                overflow,
            )
        )
    prompt = torch.zeros(token_ids.shape, device=token_ids.device)  # (rows, prompt)
    new_active = torch.stack([step.active for step in steps], dim=1)  # (rows, new)
    prompt_real = torch.ones_like(prompt) if attention_mask is None else attention_mask
    return Generated(
        token_ids=torch.cat([token_ids, *(step.token_ids[:, None] for step in steps)], dim=1),
        attention_mask=torch.cat([prompt_real.bool(), new_active], dim=1),
        response_mask=torch.cat([prompt.bool(), new_active], dim=1),
        logprobs=torch.cat([prompt, *(step.logprobs[:, None] for step in steps)], dim=1),
        sampling_logprobs=torch.cat(
            [prompt, *(step.sampling_logprobs[:, None] for step in steps)], dim=1
        ),
    )


@dataclass(frozen=True)
class NewTokens:
    """One new token for every row. Rows that have ended are not active; their values are
    padding."""

    token_ids: Int[Tensor, " rows"]
    active: Bool[Tensor, " rows"]
    logprobs: Float[Tensor, " rows"]
    sampling_logprobs: Float[Tensor, " rows"]


def generation_steps(
    model: GPT2,
    token_ids: Int[Tensor, "rows prompt"],
    max_new_tokens: int,
    attention_mask: Tensor | None,
    sampling: Sampling,
    stop_ids: Sequence[int],
    generator: torch.Generator | None,
    overflow: str,
) -> Iterator[NewTokens]:
    """The loop behind `generate` and `stream`: read, choose, feed back; stop when every row has
    ended. To be run in eval mode without gradients."""
    stop_ids = [int(token_id) for token_id in stop_ids]
    check_generation_request(model, token_ids, attention_mask, max_new_tokens, stop_ids, overflow)
    rows, prompt = token_ids.shape
    text = torch.cat(
        [token_ids, token_ids.new_zeros(rows, max_new_tokens)], dim=1
    )  # (rows, prompt + new)
    is_real = torch.ones_like(text, dtype=torch.bool)
    if attention_mask is not None:
        is_real[:, :prompt] = attention_mask.bool()
    active = torch.ones(rows, dtype=torch.bool, device=text.device)
    stops = torch.tensor(stop_ids, dtype=text.dtype, device=text.device)

    reader = Reader(model, rows, capacity=text.shape[1], slide=overflow == "slide")
    for end in range(prompt, prompt + max_new_tokens):
        logits = reader.next_logits(text[:, :end], is_real[:, :end])  # (rows, vocab)
        chosen, sampling_logprobs = sampling.choose(
            logits, text[:, :end], is_real[:, :end], generator
        )
        chosen = torch.where(active, chosen, text[:, end - 1])
        text[:, end] = chosen
        logprobs = logits.log_softmax(dim=1).gather(1, chosen[:, None])[:, 0]
        yield NewTokens(chosen, active, logprobs * active, sampling_logprobs * active)
        active = active & ~torch.isin(chosen, stops)
        if stop_ids and not active.any():
            return


class Reader:
    """Gives the logits of the next token of a growing text; the model reads only new tokens."""

    def __init__(self, model: GPT2, rows: int, capacity: int, slide: bool) -> None:
        self.model, self.slide = model, slide
        self.kernels = decoding_kernels(model, rows)
        self.context = model.config.context_length
        self.capacity = min(capacity, self.context) if slide else capacity
        self.cache: KeyValueCache | None = None
        self.forgotten: Int[Tensor, " rows"] | int = 0  # real tokens before each row's window

    def next_logits(
        self, text: Int[Tensor, "rows tokens"], is_real: Bool[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows vocab"]:
        if self.cache is None:
            if self.slide:
                text, is_real = self.windows(text, is_real, longest=self.context)
            logits = self.prefill(text, is_real)  # (rows, vocab)
        elif self.cache.length == self.cache.max_tokens:  # only when sliding
            logits = self.prefill(*self.windows(text, is_real, max(1, self.context // 2)))
        else:
            with self.kernels:
                logits = self.model(text[:, -1:], cache=self.cache)[:, -1]  # (rows, vocab)
        return logits.float()

    def windows(
        self, text: Int[Tensor, "rows tokens"], is_real: Bool[Tensor, "rows tokens"], longest: int
    ) -> tuple[Int[Tensor, "rows columns"], Bool[Tensor, "rows columns"]]:
        """The tokens of each row that the model reads: its window and all later tokens, or, where
        they exceed the context, the last `longest` of them.

        Only real tokens count, as if each row were alone. All rows end in the last column, so the
        cache is full exactly when the longest window fills the context.
        """
        length = is_real.sum(dim=1)  # (rows)
        window = length - self.forgotten  # (rows)
        window = torch.where(window > self.context, longest, window)
        self.forgotten = length - window
        rows = zip(text, is_real, window.tolist(), strict=True)
        text, is_real = pad_left([ids[real][-columns:] for ids, real, columns in rows])
        return text, is_real.to(text.device)

    def prefill(
        self, text: Int[Tensor, "rows columns"], is_real: Bool[Tensor, "rows columns"]
    ) -> Float[Tensor, "rows vocab"]:
        """Fill a new cache with the text; the logits of each row's last token."""
        weight = self.model.tok_emb.weight
        self.cache = KeyValueCache(
            self.model.config, len(text), self.capacity, weight.device, cache_dtype(weight)
        )
        mask = None if is_real.all() else is_real
        logits = last_token_logits(self.model, text, mask, self.cache)
        check_cache_is_filled(self.cache, text.shape[1])
        return logits


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


def complete(
    model: GPT2, tokenizer: Tokenizer, prompt: str, max_new_tokens: int = 100, **sampling
) -> str:
    """The prompt and its continuation. Arguments are those of `stream`."""
    return prompt + "".join(stream(model, tokenizer, prompt, max_new_tokens, **sampling))


def stream(
    model: GPT2,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 100,
    stop_strings: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    generator: torch.Generator | None = None,
    overflow: str = "error",
    **sampling,
) -> Iterator[str]:
    """The continuation of a prompt, piece by piece as it is generated, in whole characters.

    Ends at <|endoftext|>, at any of `stop_ids`, or before the first of `stop_strings` (one string
    counts as one stop); none of them is part of the text.
    sampling: temperature, top_k, top_p, repetition_penalty, no_repeat_ngram_size.
    """
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty: give at least one word to continue")
    device = model.tok_emb.weight.device
    stop_ids = [tokenizer.eos_id, *stop_ids]
    steps = generation_steps(
        model,
        torch.tensor([ids], device=device),
        max_new_tokens,
        None,
        Sampling(**sampling),
        stop_ids,
        generator,
        overflow,
    )
    new_ids = (int(step.token_ids[0]) for step in each_evaluating(model, steps))
    pieces = tokenizer.decode_stream(i for i in new_ids if i not in stop_ids)
    yield from until_stop(pieces, stop_strings)


def each_evaluating(model: GPT2, steps: Iterator[NewTokens]) -> Iterator[NewTokens]:
    """The steps, each computed in eval mode; between two the model is in its own mode."""
    while True:
        with evaluating(model):
            step = next(steps, None)
        if step is None:
            return
        yield step


def until_stop(pieces: Iterator[str], stop_strings: str | Sequence[str]) -> Iterator[str]:
    """Pass text on up to the first stop string; hold back an ending that may be the start of
    one."""
    if isinstance(stop_strings, str):  # a string is a sequence too, of its characters
        stop_strings = [stop_strings]
    stop_strings = [stop for stop in stop_strings if stop]
    held = ""
    for piece in pieces:
        held += piece
        found = [held.find(stop) for stop in stop_strings if stop in held]
        if found:
            if before := held[: min(found)]:
                yield before
            return
        keep = max((overlap(held, stop) for stop in stop_strings), default=0)
        if ready := held[: len(held) - keep]:
            yield ready
        held = held[len(held) - keep :]
    if held:
        yield held


def overlap(text: str, stop: str) -> int:
    """Length of the longest ending of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0
    )
