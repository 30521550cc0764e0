"""Generation: prefill the prompt, decode token by token, stream text.

`generate` works on token ids, in batches; `complete` and `stream` on text. All of them use the
key/value cache and call the model itself. They restore the model's mode and keep no gradients.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from gpt2mini.checks import check_generation_request
from gpt2mini.generation_arguments import (
    Ids,
    Rows,
    Seed,
    as_generator,
    as_ids,
    as_rows,
    as_texts,
    bare_model,
    named_arguments,
    refuse_other_spellings,
)
from gpt2mini.model import GPT2
from gpt2mini.reader import Reader
from gpt2mini.responses import DraftCounts, Generated, NewTokens, joined
from gpt2mini.sampling import Sampling, whole_number
from gpt2mini.speculative import Drafting, speculative_steps
from gpt2mini.stop_strings import until_stop
from gpt2mini.token_rules import TokenRules
from gpt2mini.tokenizer import END_OF_TEXT, Tokenizer
from gpt2mini.valid_utf8 import TextStates, ValidUTF8


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
    draft: GPT2 | None = None,
    lookup: int = 0,
    draft_tokens: int = 4,
    **others: Any,
) -> Generated:
    """Continue each row by up to `max_new_tokens` tokens; a row ends early at any of `stop_ids`.

    attention_mask: 0 for padding, on either side of a prompt. num_samples: continuations of each
    prompt, in neighboring rows; the model reads the prompt once for all of them. generator: or a
    seed. overflow: what to do when a row outgrows the context; "error", or "slide": forget its
    older half and read the newer half again (GPT-2's positions are absolute, so a window cannot
    move without that). forbidden_ids: never generated, as
    `tokenizer.missing_ids(model.config.vocab_size)` of a padded vocabulary. valid_utf8: see
    `ValidUTF8`. Several threads may share a model that is in eval mode.

    Speculative decoding writes faster, from the same distribution (at temperature 0, the same
    tokens). draft: a smaller model of the same vocabulary, which guesses the next `draft_tokens`
    tokens. lookup: or, without a second model, these are what followed the last `lookup` tokens
    where they stood before in the text. `Generated.drafts` counts how many were right.

    Raises ValueError for values that make no sense, and for logits that are NaN; TypeError for
    arguments of another kind, or of another library's name.
    """
    refuse_other_spellings(others, named_arguments(generate))
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
    drafting = Drafting(draft, lookup, draft_tokens, DraftCounts())
    with drafting.evaluating(model):  # once, not for each token: it visits every layer
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
                drafting,
                num_samples,
            )
        )
    return joined(token_ids, attention_mask, steps, drafting.counts)


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
    drafting: Drafting,
    copies: int = 1,
) -> Iterator[NewTokens]:
    """What is behind `generate` and `stream`: check the request, then one token of each row after
    another. To be run in eval mode without gradients. copies: rows of each prompt."""
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens)
    check_generation_request(
        model, token_ids, attention_mask, max_new_tokens, stop_ids, forbidden_ids, overflow
    )
    if valid_utf8 is not None and not isinstance(valid_utf8, ValidUTF8):
        raise TypeError(
            f"valid_utf8 must be ValidUTF8(tokenizer, model.config.vocab_size), not {valid_utf8!r} "
            "(stream and complete, which know the tokenizer, take True)"
        )
    drafting.check(model)
    rows, prompt = token_ids.shape
    device = token_ids.device
    is_real = torch.ones_like(token_ids, dtype=torch.bool)
    if attention_mask is not None:
        is_real = attention_mask.bool()
    stops = torch.tensor(stop_ids, dtype=token_ids.dtype, device=device)
    forbidden = torch.tensor(forbidden_ids, dtype=torch.long, device=device)
    rules = TokenRules(sampling, forbidden, generator)
    drafter = drafting.drafter(token_ids, max_new_tokens, rules, model.config.vocab_size)
    if valid_utf8 is not None:
        states = TextStates(valid_utf8, token_ids, is_real, stops)
        rules = replace(rules, states=states)
    capacity = prompt + max_new_tokens + drafting.spare_columns()
    reader = Reader(model, rows, capacity, overflow == "slide", copies)
    if drafter is None:
        return plain_steps(reader, token_ids, is_real, rules, max_new_tokens, stops)
    return speculative_steps(
        reader, drafter, token_ids, is_real, rules, max_new_tokens, stops, drafting
    )


def plain_steps(
    reader: Reader,
    prompt: Int[Tensor, "rows prompt"],
    prompt_is_real: Bool[Tensor, "rows prompt"],
    rules: TokenRules,
    max_new_tokens: int,
    stops: Int[Tensor, " stops"],
) -> Iterator[NewTokens]:
    """The loop: read, choose, feed back; stop when every row has ended."""
    rows, start = prompt.shape
    text = F.pad(prompt, (0, max_new_tokens))  # (rows, prompt + new)
    is_real = F.pad(prompt_is_real, (0, max_new_tokens), value=True)
    active = torch.ones(rows, dtype=torch.bool, device=text.device)
    for end in range(start, start + max_new_tokens):
        logits = reader.read(text[:, :end], is_real[:, :end])[:, -1]  # (rows, vocab)
        tokens_left = text.shape[1] - end - 1
        allowed = rules.apply(logits, text[:, :end], is_real[:, :end], tokens_left)
        # a row that has ended draws too, and must not be left without a token
        chosen, sampling_logprobs = rules.draw(allowed.masked_fill(~active[:, None], 0))
        chosen = torch.where(active, chosen, text[:, end - 1])
        text[:, end] = chosen
        logprobs = logits.log_softmax(dim=1).gather(1, chosen[:, None])[:, 0]
        yield NewTokens(chosen, active, logprobs, sampling_logprobs)
        if rules.states is not None:
            rules.states.read(chosen, active)
        active = active & ~torch.isin(chosen, stops)
        if len(stops) and not active.any():
            return


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
    draft: GPT2 | None = None,
    lookup: int = 0,
    draft_tokens: int = 4,
    counts: DraftCounts | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """The continuation of a prompt, piece by piece as it is generated, in whole characters.

    An empty prompt, or <|endoftext|> alone, begins a text, as OpenAI's
    generate_unconditional_samples.py. Ends at the tokenizer's eos token, at any of `stop_ids`, or
    before the first of `stop_strings` (one string counts as one stop); none of them is part of the
    text. Ids that the tokenizer lacks are never generated. valid_utf8: no broken characters come
    out, see `ValidUTF8`. allow_special: the prompt may hold special tokens, such as chat tokens.
    draft, lookup, draft_tokens: as of `generate`; `counts` is filled in with what became of them.
    sampling: temperature, top_k, top_p, repetition_penalty, no_repeat_ngram_size.
    """
    rules = named_arguments(Sampling)
    refuse_other_spellings(sampling.keys() - rules, [*named_arguments(stream), *rules])
    model = bare_model(model)
    vocab_size, device = model.config.vocab_size, model.tok_emb.weight.device
    stops = [tokenizer.eos_id, *as_ids("stop_ids", stop_ids)]
    drafting = Drafting(draft, lookup, draft_tokens, DraftCounts() if counts is None else counts)
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
        drafting,
    )
    new_ids = (int(step.token_ids[0]) for step in each_evaluating(model, drafting, steps))
    pieces = tokenizer.decode_stream(i for i in new_ids if i not in stops)
    return until_stop(pieces, as_texts("stop_strings", stop_strings))


def prompt_ids(tokenizer: Tokenizer, prompt: str, allow_special: bool) -> list[int]:
    if prompt in ("", END_OF_TEXT):
        return [tokenizer.vocab[END_OF_TEXT] if tokenizer.bos_id is None else tokenizer.bos_id]
    return tokenizer.encode(prompt, allow_special)


def each_evaluating(
    model: GPT2, drafting: Drafting, steps: Iterator[NewTokens]
) -> Iterator[NewTokens]:
    """The steps, each computed in eval mode; between two the model is in its own mode."""
    while True:
        with drafting.evaluating(model):
            step = next(steps, None)
        if step is None:
            return
        yield step
