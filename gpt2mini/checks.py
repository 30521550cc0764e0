"""Refusals of bad input that several modules share: what was wrong, what was expected, what to do.

Each function raises ValueError (or TypeError) before any kernel runs. Checks that read values of a
tensor are left out where there are none to read; `holds` says where.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gpt2mini.config import GPT2Config
from gpt2mini.masking import IGNORED

if TYPE_CHECKING:
    from gpt2mini.cache import KeyValueCache
    from gpt2mini.model import GPT2


def holds(condition: Bool[Tensor, ""]) -> bool:
    """Whether a condition on values of a tensor holds. False where values cannot be read: while
    torch.compile, torch.export or torch.jit trace, in a captured CUDA graph, under torch.func.vmap,
    and for tensors without values (device "meta", FakeTensor)."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if condition.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    try:
        return bool(condition)  # the host waits for a GPU here
    except RuntimeError:  # vmap, "meta" and FakeTensor have no common test, but all raise this
        return False


# ---- the model's arguments


def check_config(config: GPT2Config) -> None:
    if not isinstance(config, GPT2Config):
        raise TypeError(
            f"GPT2 takes a GPT2Config, not a {type(config).__name__}: "
            "GPT2(GPT2Config(**settings)), or GPT2.from_pretrained(name_or_folder)"
        )


def check_start(
    config: GPT2Config,
    token_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    stream: Tensor | None,
) -> Tensor:
    """The one start of the forward pass that was given, or raise: token ids (batch, tokens), their
    vectors or the residual stream of a later block (batch, tokens, emb)."""
    given = [start for start in (token_ids, inputs_embeds, stream) if start is not None]
    if len(given) != 1:
        raise ValueError(
            f"give token_ids, inputs_embeds or stream, and only one of them; got {len(given)}"
        )
    if token_ids is not None:
        check_token_ids(config, token_ids)
    else:
        check_vectors(config, given[0], "inputs_embeds" if stream is None else "stream")
    return given[0]


def check_blocks(
    config: GPT2Config,
    blocks: int,
    first_block: int,
    n_blocks: int,
    cache: "KeyValueCache | None",
) -> None:
    """Which of so many blocks compute: from number `first_block` on, up to `n_blocks` of them."""
    if not 0 <= first_block <= n_blocks <= blocks:
        raise ValueError(
            f"first_block ({first_block}) and n_blocks ({n_blocks}) must lie in this order between "
            f"0 and the number of blocks, {blocks}"
        )
    if cache is not None and blocks != config.n_layers:
        raise ValueError(
            f"the model has {blocks} blocks and a config of n_layers={config.n_layers}, by which a "
            f"cache is made: model.config = dataclasses.replace(model.config, n_layers={blocks}); "
            "surgery.first_blocks and surgery.grow_depth change both"
        )
    if cache is not None and (first_block > 0 or n_blocks < blocks):
        raise ValueError(
            f"a cache is filled by all {blocks} blocks, not by those from {first_block} to "
            f"{n_blocks}: surgery.first_blocks makes a model of the first ones"
        )


def check_vectors(config: GPT2Config, vectors: Tensor, name: str) -> None:
    if vectors.ndim != 3 or vectors.shape[2] != config.emb_dim or vectors.numel() == 0:
        raise ValueError(
            f"{name} must have the shape (batch, tokens, {config.emb_dim}) and hold at least one "
            f"token, not {tuple(vectors.shape)}"
        )
    if not vectors.is_floating_point():
        raise ValueError(
            f"{name} must hold floating-point vectors, not {vectors.dtype}: token ids are token_ids"
        )


def check_token_ids(config: GPT2Config, token_ids: Tensor) -> None:
    if not isinstance(token_ids, Tensor):
        raise TypeError(
            f"token_ids must be a tensor, not a {type(token_ids).__name__}: torch.tensor([ids])"
        )
    if token_ids.ndim != 2 or token_ids.numel() == 0:
        raise ValueError(
            f"token_ids must have the shape (batch, tokens) and hold at least one token, "
            f"not {tuple(token_ids.shape)}; for one text use torch.tensor([ids])"
        )
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"token_ids must be torch.long (or torch.int), not {token_ids.dtype}")
    outside = (token_ids < 0) | (token_ids >= config.vocab_size)  # (batch, tokens)
    advice = (
        f"outside the vocabulary of {config.vocab_size} (0 to {config.vocab_size - 1}): "
        "do the tokenizer and the model belong together?"
    )
    if torch.compiler.is_dynamo_compiling() and token_ids.device.type == "cpu":
        torch._assert_async(~outside.any(), f"a token id is {advice}")  # part of the graph
    elif holds(outside.any()):  # without mask and positions the only wait for a GPU
        raise ValueError(f"token id {int(token_ids[outside][0])} is {advice}")


def check_mask_and_cache(
    config: GPT2Config,
    like: Tensor,
    attention_mask: Tensor | None,
    cache: "KeyValueCache | None",
) -> None:
    """like: a tensor of the shape (batch, tokens) of the new tokens."""
    batch, tokens = like.shape
    if cache is not None:
        check_cache(config, batch, tokens, cache)
    if attention_mask is None:
        return
    past = 0 if cache is None else cache.length
    shapes = [(batch, tokens), (batch, past + tokens)]  # no set: symbolic sizes have no hash
    if tuple(attention_mask.shape) not in shapes:
        raise ValueError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}; "
            f"expected that of token_ids, {(batch, tokens)}"
            + (f", or with the cached tokens {(batch, past + tokens)}" if past else "")
        )
    if attention_mask.is_floating_point():
        raise ValueError(
            f"attention_mask must be integers or booleans (1 real, 0 padding), "
            f"not {attention_mask.dtype}"
        )
    if attention_mask.dtype != torch.bool:
        check_mask_values(attention_mask, cache)
    if cache is not None:
        check_cached_part(attention_mask[:, :-tokens], cache)


def check_cache(config: GPT2Config, batch: int, tokens: int, cache: "KeyValueCache") -> None:
    past = cache.length
    if len(cache.layers) != config.n_layers:
        raise ValueError(
            f"the cache is for {len(cache.layers)} blocks, the model has {config.n_layers}: "
            "make it with KeyValueCache(model.config, ...)"
        )
    lengths = [layer.length for layer in cache.layers]
    if cache.segment_ids is not None:
        lengths.append(cache.segment_ids.shape[1])
    if any(length != past for length in lengths):
        raise ValueError(
            f"the cache holds {past} tokens of one block and {min(lengths)} to {max(lengths)} of "
            "all: an earlier call broke off on its way through the blocks, or a block does not "
            "call cache.append; read the text again into a new KeyValueCache"
        )
    if batch != cache.batch_size or past + tokens > cache.max_tokens:
        raise ValueError(
            f"the cache is for {cache.batch_size} rows of at most {cache.max_tokens} tokens and "
            f"holds {past}; {batch} rows of {tokens} more do not fit: make a larger KeyValueCache"
        )


def check_mask_values(attention_mask: Tensor, cache: "KeyValueCache | None") -> None:
    if holds(attention_mask.min() < 0):
        raise ValueError(
            f"attention_mask holds {int(attention_mask.min())}; expected 0 for padding and 1 for "
            "real tokens (or 1, 2, 3, ... for several texts in a row)"
        )
    if cache is not None and holds(attention_mask.max() > 1):
        raise ValueError("a cache takes one text a row: an attention_mask of 0 and 1")


def check_cached_part(cached_mask: Tensor, cache: "KeyValueCache") -> None:
    """Raise ValueError where a mask, (batch, past), calls a cached token padding that was read as
    real, or the reverse: what the later tokens have computed from it cannot be taken back."""
    if cached_mask.numel() == 0:  # the mask is of the new tokens alone
        return
    if cache.segment_ids is None:
        were_real = torch.ones_like(cached_mask, dtype=torch.bool)  # (batch, past)
    else:
        were_real = cache.segment_ids.bool()  # (batch, past)
    differing = cached_mask.bool() != were_real  # (batch, past)
    if holds(differing.any()):
        row, column = differing.nonzero()[0].tolist()
        was, now = ("real", "padding") if were_real[row, column] else ("padding", "real")
        raise ValueError(
            f"attention_mask calls the cached token in row {row}, column {column} {now}, but it "
            f"was read as {was}: give the mask of padded tokens when they are first read, and "
            "later the same for them, or that of the new tokens alone"
        )


def check_positions(config: GPT2Config, position_ids: Tensor, like: Tensor) -> None:
    """Positions that the caller gave. like: a tensor of the shape (batch, tokens)."""
    batch, tokens = like.shape
    if tuple(position_ids.shape) not in ((batch, tokens), (1, tokens)):
        raise ValueError(
            f"position_ids has the shape {tuple(position_ids.shape)}; expected {(batch, tokens)}"
        )
    check_largest_position(config, position_ids)
    if holds(position_ids.min() < 0):
        raise ValueError(f"position {int(position_ids.min())} is negative: positions count from 0")


def check_derived_positions(
    config: GPT2Config, position_ids: Tensor, total: int, segments: Tensor | None
) -> None:
    """Positions counted in rows of `total` columns: their values are read only where padding, or
    several segments, may keep a row that is longer than the context within it."""
    if segments is None:
        check_length(config, total)
    elif total > config.context_length:
        check_largest_position(config, position_ids)


def check_largest_position(config: GPT2Config, position_ids: Tensor) -> None:
    largest = position_ids.max()
    if holds(largest >= config.context_length):
        check_length(config, int(largest) + 1)


def check_length(config: GPT2Config, tokens: int) -> None:
    if tokens > config.context_length:
        raise ValueError(
            f"{tokens} tokens do not fit the context of {config.context_length}: "
            "shorten or split the text (in generation: overflow='slide')"
        )


def check_predicts_tokens(model: "GPT2") -> None:
    """Raise ValueError for a head that is not one over the vocabulary, such as a classifier's."""
    outputs = getattr(model.out_head, "out_features", None)
    if outputs is None:  # a head of your own, which has to be tried
        with torch.no_grad():
            outputs = model.out_head(model.tok_emb.weight[None, :1]).shape[-1]
    if outputs != model.config.vocab_size:
        raise ValueError(
            f"the output head has {outputs} outputs; expected {model.config.vocab_size}, one for "
            "each token of the vocabulary: a classifier gives no probabilities of tokens. Use the "
            "language model, or classification_report for a classifier"
        )


def check_reward_head(model: "GPT2") -> None:
    """Raise ValueError for a model whose head has more than one output."""
    if getattr(model.out_head, "out_features", None) != 1:
        raise ValueError(
            "this is no reward model: its output head must have one output "
            "(give_reward_head(model), or load a trained reward model)"
        )


# ---- generation


def check_cache_is_filled(cache: "KeyValueCache", tokens: int) -> None:
    """Raise ValueError if a block of your own has not stored its keys and values."""
    lengths = [layer.length for layer in cache.layers]
    if lengths != [tokens] * len(lengths):
        layer = next(i for i, length in enumerate(lengths) if length != tokens)
        raise ValueError(
            f"trf_blocks.{layer} has stored {lengths[layer]} of {tokens} tokens in the cache, "
            "without which it cannot generate: call cache.append(keys, values) in its attention"
        )


def check_generation_request(
    model: "GPT2",
    token_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    forbidden_ids: Sequence[int],
    overflow: str,
) -> None:
    if overflow not in ("error", "slide"):
        raise ValueError(f"overflow must be 'error' or 'slide', not {overflow!r}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if token_ids.ndim != 2 or token_ids.numel() == 0:
        raise ValueError(
            f"the prompt must have the shape (batch, tokens) and at least one token, "
            f"not {tuple(token_ids.shape)}"
        )
    check_token_ids(model.config, token_ids)
    check_predicts_tokens(model)
    vocab = model.config.vocab_size
    for name, ids in (("stop", stop_ids), ("forbidden", forbidden_ids)):
        if strange := [i for i in ids if not 0 <= i < vocab]:
            raise ValueError(f"{name} id {strange[0]} is outside the vocabulary of {vocab}")
    longest = token_ids.shape[1]
    if attention_mask is not None:
        check_prompt_mask(model.config, token_ids, attention_mask)
        longest = int(attention_mask.sum(dim=1).max())
    context = model.config.context_length
    if overflow == "error" and longest + max_new_tokens > context:
        fewer = f"ask for at most {context - longest}, " if longest < context else ""
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the context "
            f"of {context}: {fewer}shorten the prompt, or pass overflow='slide'"
        )


def check_prompt_mask(config: GPT2Config, token_ids: Tensor, attention_mask: Tensor) -> None:
    """What the model asks of a mask, and that there is one text in each row."""
    check_mask_and_cache(config, token_ids, attention_mask, cache=None)
    if int(attention_mask.max()) > 1:
        raise ValueError(
            f"attention_mask holds {int(attention_mask.max())}: expected one text in each row, a "
            "mask of 0 and 1; give each text a row of its own"
        )
    if not attention_mask.any(dim=1).all():
        raise ValueError("a row of the prompt is nothing but padding: there is nothing to continue")


# ---- losses


def check_same_shape(name: str, tensor: Tensor, other: Tensor) -> None:
    """Raise ValueError for a shape that torch would stretch, or refuse in other words."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape {tuple(other.shape)}, not {tuple(tensor.shape)}"
        )


def check_in_vocabulary(targets: Int[Tensor, "batch tokens"], vocab_size: int) -> None:
    """Raise ValueError for a target that is neither a token id nor IGNORED."""
    outside = (targets != IGNORED) & ((targets < 0) | (targets >= vocab_size))  # (batch, tokens)
    if holds(outside.any()):
        raise ValueError(
            f"label {int(targets[outside][0])} is outside the vocabulary of {vocab_size} "
            f"(0 to {vocab_size - 1}): labels are token ids, and {IGNORED}, not -1, where nothing "
            "is to be learned"
        )


def check_labels_not_shifted(
    token_ids: Int[Tensor, "batch tokens"], labels: Int[Tensor, "batch tokens"]
) -> None:
    """Raise ValueError for labels that look already shifted, which would train the token after
    next."""
    kept = labels[:, :-1] != IGNORED
    looks_shifted = kept.any() & ((labels[:, :-1] == token_ids[:, 1:]) | ~kept).all()
    looks_right = ((labels == token_ids) | (labels == IGNORED)).all()
    if holds(looks_shifted & ~looks_right):  # as one question, for which a GPU is waited for once
        raise ValueError(
            "the labels look already shifted by one (labels[:, :-1] equals token_ids[:, 1:]): "
            "pass the token ids themselves; the loss does the shift"
        )


def check_response_mask(
    token_ids: Tensor, attention_mask: Tensor | None, response_mask: Tensor
) -> None:
    if response_mask.shape != token_ids.shape or response_mask.dtype != torch.bool:
        raise ValueError(
            f"response_mask must be of bool and the shape {tuple(token_ids.shape)} of token_ids, "
            f"not {response_mask.dtype} and {tuple(response_mask.shape)}"
        )
    numbers = torch.ones_like(token_ids) if attention_mask is None else attention_mask.long()
    same_text = torch.zeros_like(response_mask)  # as the token to its left; never in column 0
    same_text[:, 1:] = (numbers[:, 1:] == numbers[:, :-1]) & (numbers[:, 1:] > 0)
    if holds((response_mask & ~same_text).any()):
        raise ValueError(
            "a response token has no real token before it that could predict it: a prompt needs at "
            "least one token, and padding is no response"
        )
