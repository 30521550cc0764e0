"""Generation: prefill the prompt, decode token by token, stream text.

`generate` works on token ids, in batches; `complete` and `stream` on text. All of them use the
key/value cache and call the model itself. They restore the model's mode and keep no gradients.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gpt2mini.cache import KeyValueCache
from gpt2mini.checks import check_cache_is_filled, check_generation_request
from gpt2mini.generation_arguments import (
    Ids,
    Rows,
    Seed,
    as_generator,
    as_ids,
    as_rows,
    as_texts,
    bare_model,
    refuse_other_spellings,
)
from gpt2mini.kernels import decoding_kernels
from gpt2mini.masking import align_right, pad_left
from gpt2mini.model import GPT2, accepts_shortcut
from gpt2mini.modes import evaluating
from gpt2mini.sampling import FORBIDDEN, Sampling, whole_number
from gpt2mini.stop_strings import until_stop
from gpt2mini.tokenizer import END_OF_TEXT, Tokenizer
from gpt2mini.valid_utf8 import TextStates, ValidUTF8


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
    token_ids: Int[Tensor, "batch tokens"] | Rows,
    max_new_tokens: int,
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | Rows | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    stop_ids: Ids = (),
    num_samples: int = 1,
    generator: Seed = None,
    overflow: str = "error",
    forbidden_ids: Ids = (),
    valid_utf8: ValidUTF8 | None = None,
    **others: Any,
) -> Generated:
    """Continue each row by up to `max_new_tokens` tokens; a row ends early at any of `stop_ids`.

    attention_mask: 0 for padding, on either side of a prompt. num_samples: continuations of each
    prompt, in neighboring rows. generator: or a seed. overflow: what to do when a row outgrows the
    context; "error", or "slide": forget its older half and read the newer half again (GPT-2's
    positions are absolute, so a window cannot move without that). forbidden_ids: never generated,
    as `tokenizer.missing_ids(model.config.vocab_size)` of a padded vocabulary. valid_utf8: see
    `ValidUTF8`. Several threads may share a model that is in eval mode.

    Raises ValueError for values that make no sense, and for logits that are NaN; TypeError for
    arguments of another kind, or of another library's name.
    """
    refuse_other_spellings(others, signature(generate).parameters)
    model = bare_model(model)
    sampling = Sampling(repetition_penalty, no_repeat_ngram_size, temperature, top_k, top_p)
    num_samples = whole_number("num_samples", num_samples)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    device = model.tok_emb.weight.device
    token_ids = as_rows("token_ids", token_ids, device).repeat_interleave(num_samples, dim=0)
    if attention_mask is not None:
        attention_mask = as_rows("attention_mask", attention_mask, device)
        attention_mask = attention_mask.repeat_interleave(num_samples, dim=0)
    with evaluating(model):  # once, not for each token: it visits every layer
        steps = list(
            generation_steps(
                model,
                token_ids,  # (rows, prompt)
                max_new_tokens,
                attention_mask,
                sampling,
                as_ids("stop_ids", stop_ids),
                as_generator(generator, device),
                overflow,
                as_ids("forbidden_ids", forbidden_ids),
                valid_utf8,
            )
        )
    return joined(token_ids, attention_mask, steps)


@dataclass(frozen=True)
class NewTokens:
    """One new token for every row. Rows that have ended are not active; their values are
    padding."""

    token_ids: Int[Tensor, " rows"]
    active: Bool[Tensor, " rows"]
    logprobs: Float[Tensor, " rows"]
    sampling_logprobs: Float[Tensor, " rows"]


def joined(
    token_ids: Int[Tensor, "rows prompt"], attention_mask: Tensor | None, steps: list[NewTokens]
) -> Generated:
    """The prompt and all steps behind it."""
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


def generation_steps(
    model: GPT2,
    token_ids: Int[Tensor, "rows prompt"],
    max_new_tokens: int,
    attention_mask: Tensor | None,
    sampling: Sampling,
    stop_ids: list[int],
    generator: torch.Generator | None,
    overflow: str,
    forbidden_ids: list[int],
    valid_utf8: ValidUTF8 | None,
) -> Iterator[NewTokens]:
    """The loop behind `generate` and `stream`: read, choose, feed back; stop when every row has
    ended. To be run in eval mode without gradients."""
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens)
    check_generation_request(
        model, token_ids, attention_mask, max_new_tokens, stop_ids, forbidden_ids, overflow
    )
    rows, prompt = token_ids.shape
    text = torch.cat(
        [token_ids, token_ids.new_zeros(rows, max_new_tokens)], dim=1
    )  # (rows, prompt + new)
    is_real = torch.ones_like(text, dtype=torch.bool)
    if attention_mask is not None:
        is_real[:, :prompt] = attention_mask.bool()
    active = torch.ones(rows, dtype=torch.bool, device=text.device)
    stops = torch.tensor(stop_ids, dtype=text.dtype, device=text.device)
    states = None
    if valid_utf8 is not None:
        states = TextStates(valid_utf8, token_ids, is_real[:, :prompt], stops)

    forbidden = torch.tensor(forbidden_ids, dtype=torch.long, device=text.device)
    reader = Reader(model, rows, capacity=text.shape[1], slide=overflow == "slide")
    for end in range(prompt, prompt + max_new_tokens):
        logits = reader.next_logits(text[:, :end], is_real[:, :end])  # (rows, vocab)
        allowed = logits.index_fill(1, forbidden, FORBIDDEN)  # (rows, vocab)
        if states is not None:
            allowed = states.forbid_broken(allowed, text.shape[1] - end - 1)
        chosen, sampling_logprobs = sampling.choose(
            allowed, text[:, :end], is_real[:, :end], generator
        )
        chosen = torch.where(active, chosen, text[:, end - 1])
        text[:, end] = chosen
        logprobs = logits.log_softmax(dim=1).gather(1, chosen[:, None])[:, 0]
        yield NewTokens(chosen, active, logprobs * active, sampling_logprobs * active)
        if states is not None:
            states.read(chosen, active)
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
    model: GPT2, tokenizer: Tokenizer, prompt: str, max_new_tokens: int = 100, **options: Any
) -> str:
    """The prompt and its continuation. Arguments are those of `stream`."""
    return prompt + "".join(stream(model, tokenizer, prompt, max_new_tokens, **options))


def stream(
    model: GPT2,
    tokenizer: Tokenizer,
    prompt: str = "",
    max_new_tokens: int = 100,
    stop_strings: str | Iterable[str] | None = (),
    stop_ids: Ids = (),
    generator: Seed = None,
    overflow: str = "error",
    forbidden_ids: Ids = (),
    valid_utf8: bool = False,
    allow_special: bool = False,
    **sampling: Any,
) -> Iterator[str]:
    """The continuation of a prompt, piece by piece as it is generated, in whole characters.

    An empty prompt, or <|endoftext|> alone, begins a text, as OpenAI's
    generate_unconditional_samples.py. Ends at the tokenizer's eos token, at any of `stop_ids`, or
    before the first of `stop_strings` (one string counts as one stop); none of them is part of the
    text. Ids that the tokenizer lacks are never generated. valid_utf8: no broken characters come
    out, see `ValidUTF8`. allow_special: the prompt may hold special tokens, such as chat tokens.
    sampling: temperature, top_k, top_p, repetition_penalty, no_repeat_ngram_size.
    """
    rules = signature(Sampling).parameters
    refuse_other_spellings(sampling.keys() - rules, [*signature(stream).parameters, *rules])
    model = bare_model(model)
    vocab_size, device = model.config.vocab_size, model.tok_emb.weight.device
    stops = [tokenizer.eos_id, *as_ids("stop_ids", stop_ids)]
    steps = generation_steps(
        model,
        torch.tensor([prompt_ids(tokenizer, prompt, allow_special)], device=device),
        max_new_tokens,
        None,
        Sampling(**sampling),
        stops,
        as_generator(generator, device),
        overflow,
        [*tokenizer.missing_ids(vocab_size), *as_ids("forbidden_ids", forbidden_ids)],
        ValidUTF8(tokenizer, vocab_size) if valid_utf8 else None,
    )
    new_ids = (int(step.token_ids[0]) for step in each_evaluating(model, steps))
    pieces = tokenizer.decode_stream(i for i in new_ids if i not in stops)
    return until_stop(pieces, as_texts("stop_strings", stop_strings))


def prompt_ids(tokenizer: Tokenizer, prompt: str, allow_special: bool) -> list[int]:
    if prompt in ("", END_OF_TEXT):
        return [tokenizer.vocab[END_OF_TEXT] if tokenizer.bos_id is None else tokenizer.bos_id]
    return tokenizer.encode(prompt, allow_special)


def each_evaluating(model: GPT2, steps: Iterator[NewTokens]) -> Iterator[NewTokens]:
    """The steps, each computed in eval mode; between two the model is in its own mode."""
    while True:
        with evaluating(model):
            step = next(steps, None)
        if step is None:
            return
        yield step
