"""What callers give to `generate` and `stream`, in the form in which these use it, or refused in
words."""

import difflib
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from gpt2mini.model import GPT2

Ids = int | Iterable[int] | Tensor | None  # one id or several, as of stop_ids
Rows = Tensor | np.ndarray | Sequence[int] | Sequence[Sequence[int]]  # ids of one text, or several
Seed = torch.Generator | int | None

OTHER_SPELLINGS = {  # of `transformers` and others -> what to write here
    "do_sample": "temperature=0 for the most likely token; any other temperature samples",
    "max_length": "max_new_tokens, which does not count the prompt",
    "max_tokens": "max_new_tokens",
    "num_return_sequences": "num_samples",
    "n": "num_samples",
    "input_ids": "token_ids",
    "inputs": "token_ids",
    "eos_token_id": "stop_ids",
    "stop_token_ids": "stop_ids",
    "stop": "stop_strings of complete and stream",
    "stop_sequences": "stop_strings of complete and stream",
    "stop_strings": "stop_strings of complete and stream, which know the tokenizer",
    "bad_words_ids": "forbidden_ids",
    "suppress_tokens": "forbidden_ids",
    "seed": "generator=SEED",
    "streamer": "stream(model, tokenizer, prompt), which yields the text piece by piece",
    "pad_token_id": "nothing: the attention_mask of the result tells which tokens are real",
    "use_cache": "nothing: the cache is always used",
    "output_scores": "nothing: the result has logprobs",
    "return_dict_in_generate": "nothing: the result has token_ids, logprobs and so on",
    "num_beams": "nothing: there is no beam search",
    "tokenizer": "complete(model, tokenizer, prompt)",
}


def refuse_other_spellings(others: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for an argument that there is not, with the name of the one that there is."""
    for name in others:
        if name in OTHER_SPELLINGS:
            raise TypeError(f"there is no argument {name}; write {OTHER_SPELLINGS[name]}")
        near = difflib.get_close_matches(name, known, n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise TypeError(f"there is no argument {name}; {meant}")


def named_arguments(function: Callable[..., Any]) -> list[str]:
    """The names of its arguments, without that of the ** at the end."""
    parameters = signature(function).parameters.values()
    return [one.name for one in parameters if one.kind is not one.VAR_KEYWORD]


def bare_model(model: nn.Module, name: str = "model") -> GPT2:
    """The model inside of DataParallel or DistributedDataParallel, which only training needs. name:
    what the argument is called."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    if not hasattr(model, "tok_emb"):
        raise TypeError(
            f"{name} must be a GPT2 of gpt2mini, not a {type(model).__name__}: "
            "GPT2.from_pretrained(folder) reads the folders of transformers"
        )
    bare: GPT2 = model  # type: ignore[assignment]
    if hasattr(bare.tok_emb.weight, "full_tensor"):  # a DTensor, of which this rank has a shard
        raise ValueError(
            "the model is sharded, and a rank whose texts end early would leave the others waiting "
            "for its shard: generate inside of training.distributed.unsharded(model)"
        )
    return bare


def as_rows(name: str, values: Any, device: torch.device) -> Shaped[Tensor, "rows tokens"]:
    """Lists, arrays and tensors, on the model's device; one text becomes a batch of one row, and
    integers become int64."""
    try:
        rows = torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{name} must be a tensor of the shape (batch, tokens), or lists of numbers of one "
            "length; masking.pad_left makes one tensor and its attention_mask of several lengths, "
            "and complete(model, tokenizer, prompt) takes text"
        ) from None
    rows = rows.long() if rows.dtype == torch.int32 else rows
    return rows[None] if rows.ndim == 1 else rows


def as_ids(name: str, ids: Any) -> list[int]:
    """One id, several in any form, or none."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    ids = [] if ids is None else ids if isinstance(ids, Iterable) else [ids]
    try:
        return [operator.index(i) for i in ids]
    except TypeError:
        raise TypeError(f"{name} must be token ids, not {ids!r}") from None


def as_texts(name: str, texts: Any) -> list[str]:
    """One text, several, or none; an empty one is left out."""
    if texts is not None and not isinstance(texts, Iterable):
        raise TypeError(f"{name} must be text, not {texts!r}")
    texts = [] if texts is None else [texts] if isinstance(texts, str) else list(texts)
    if strange := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"{name} must be text, not {strange[0]!r}")
    return [text for text in texts if text]


def as_generator(generator: Any, device: torch.device) -> torch.Generator | None:
    """A seed makes a new generator."""
    if generator is None or isinstance(generator, torch.Generator):
        if generator is not None and generator.device.type != device.type:
            raise ValueError(
                f"the generator is for {generator.device}, the model on {device}: "
                f"torch.Generator({str(device)!r}).manual_seed(...), or generator=SEED"
            )
        return generator
    if not isinstance(generator, numbers.Integral) or isinstance(generator, bool):
        raise TypeError(f"generator must be a torch.Generator or a seed, not {generator!r}")
    return torch.Generator(device).manual_seed(int(generator))
