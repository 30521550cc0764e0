"""What happens inside a forward pass: read any activation by its name, or put another in its place.

    activations = trace(model, token_ids)
    activations["blocks.3.attention"]                        # (batch, heads, tokens, tokens)
    with patched(model, {"blocks.3.head.5": 0}):             # what if that head said nothing?
        logits = model(token_ids)
    with patched(model, {"blocks.2.stream": activations["blocks.2.stream"]}):
        logits = model(other_ids)                            # ... or what it said to another text?

The names, in the order in which a forward pass comes by:

    embedding           token and position vectors, added            (batch, tokens, emb)
    blocks.3.attention  who looks at whom: each row sums to 1        (batch, heads, tokens, total)
    blocks.3.head.5     what head 5 gathers for attn_out to read     (batch, tokens, head_dim)
    blocks.3.attn_out   what attention adds to the stream            (batch, tokens, emb)
    blocks.3.mlp_out    what the MLP adds to the stream              (batch, tokens, emb)
    blocks.3.stream     the residual stream as it leaves the block   (batch, tokens, emb)
    final_norm          what the output head reads                   (batch, tokens, emb)
    logits                                                           (batch, tokens, vocab)

Everything is done by hooks of `nn.Module`, so model.py knows nothing of it, and a hook sees what a
forward pass really computes, adapters included. The exception is the attention weights: the fast
kernel never has them all, so they are computed again from the layer's own queries and keys.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gpt2mini.cache import LayerCache
from gpt2mini.config import GPT2Config
from gpt2mini.model import GPT2, MultiHeadAttention, TransformerBlock
from gpt2mini.modes import evaluating

Edit = Callable[[Tensor], Tensor]  # an activation -> what the forward pass goes on with
Patch = float | Tensor | Edit


@dataclass(frozen=True)
class Trace:
    """The activations of one forward pass by their names (above), in the order of the pass."""

    activations: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.activations:
            raise ValueError(f"{name!r} is not in the trace, which has {listed(self.names)}")
        return self.activations[name]

    def __contains__(self, name: object) -> bool:
        return name in self.activations

    def __iter__(self) -> Iterator[str]:
        return iter(self.activations)

    def __len__(self) -> int:
        return len(self.activations)

    @property
    def names(self) -> list[str]:
        return list(self.activations)

    def of_each_block(self, part: str) -> list[Tensor]:
        """One part of every block, the first block first: `of_each_block("mlp_out")`."""
        found = [x for name, x in self.activations.items() if fnmatchcase(name, f"blocks.*.{part}")]
        if not found:
            raise ValueError(f"no block has {part!r} in the trace, which has {listed(self.names)}")
        return found


def trace(
    model: GPT2,
    token_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
    names: Sequence[str] = ("*",),
) -> Trace:
    """One forward pass in eval mode without gradients, and everything that it computed on the way.

    names: what to keep, `*` standing for anything, as in "blocks.*.stream". All of it is much for
    long texts: the attention weights alone take heads x tokens x tokens numbers per block.
    Raises ValueError for names that the model has not, and for what the model itself refuses.
    """
    wanted = matching_names(model.config, names)
    found: dict[str, Tensor] = {}

    def keeper(name: str) -> Edit:
        def keep(x: Tensor) -> Tensor:
            found[name] = x.detach().clone()  # a later layer may write into it
            return x

        return keep

    with evaluating(model), ExitStack() as hooks:
        for name in wanted:
            for handle in hook(model, name, keeper(name), reads_only=True):
                hooks.callback(handle.remove)
        model(token_ids, attention_mask)
    return Trace({name: found[name] for name in wanted})


@contextmanager
def patched(model: GPT2, patches: Mapping[str, Patch]) -> Iterator[GPT2]:
    """Inside, the named activations of every forward pass are others: ablation and patching.

    A patch is a number (0 ablates), a tensor that has or broadcasts to the activation's shape, or a
    function of the activation. Gradients flow. Patches of attention weights come before those of
    heads; of two on one attention, in nested `with`, the inner one counts. Losses and scores in
    pieces (perplexity, `token_logprobs`) do not call the head: they refuse patches of the logits.
    Raises ValueError for an unknown name, and in the forward pass for a shape that does not fit.
    """
    known = activation_names(model.config)
    if unknown := [name for name in patches if name not in known]:
        raise ValueError(f"no activation is called {unknown[0]!r}; there are {listed(known)}")
    with ExitStack() as hooks:
        for name in (name for name in known if name in patches):
            for handle in hook(model, name, as_edit(name, patches[name])):
                hooks.callback(handle.remove)
        yield model


def as_edit(name: str, patch: Patch) -> Edit:
    """The function that puts a number, a tensor or a function's result in an activation's place."""

    def edit(x: Tensor) -> Tensor:
        new = patch(x) if callable(patch) else torch.as_tensor(patch)
        try:
            return new.to(x.device, x.dtype).expand(x.shape)
        except (RuntimeError, AttributeError):
            given = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(
                f"the patch of {name} gives {given}; expected the shape {tuple(x.shape)}"
            ) from None

    if not callable(patch) and not isinstance(patch, int | float | Tensor):
        raise ValueError(
            f"a patch is a number, a tensor or a function, not {type(patch).__name__} ({name})"
        )
    return edit


# ---- names


def activation_names(config: GPT2Config) -> list[str]:
    """Every name that `trace` and `patched` know, in the order of a forward pass."""
    heads = [f"head.{head}" for head in range(config.n_heads)]
    parts = ["attention", *heads, "attn_out", "mlp_out", "stream"]
    blocks = [f"blocks.{layer}.{part}" for layer in range(config.n_layers) for part in parts]
    return ["embedding", *blocks, "final_norm", "logits"]


def matching_names(config: GPT2Config, patterns: Sequence[str]) -> list[str]:
    known = activation_names(config)
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(f"no activation is called {pattern!r}; there are {listed(known)}")
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)]


def listed(names: Sequence[str]) -> str:
    """Names for a message: of many blocks the first and the last, of many heads too."""
    if len(names) <= 12:
        return ", ".join(names)
    ends = {name.split(".")[1] for name in names if name.startswith("blocks.")}
    last = max(ends, key=int, default="0")
    parts = dict.fromkeys(name.split(".", 2)[2] for name in names if name.startswith("blocks."))
    plain = [part for part in parts if not part.startswith("head.")]
    heads = [part for part in parts if part.startswith("head.")]
    shown = [*plain, f"head.0 ... {heads[-1]}"] if heads else plain
    others = [name for name in names if not name.startswith("blocks.")]
    return f"{', '.join(others)} and, for blocks.0 to blocks.{last}, {', '.join(shown)}"


# ---- where the names are in the model


def hook(model: GPT2, name: str, edit: Edit, reads_only: bool = False) -> list[RemovableHandle]:
    """Let `edit` see, and replace, a named activation in every forward pass."""
    if not name.startswith("blocks."):
        module = {"embedding": model.drop_emb, "final_norm": model.final_norm}.get(name)
        return [edit_output(model.out_head if module is None else module, edit)]
    _, layer, part = name.split(".", 2)
    block = model.trf_blocks[int(layer)]
    assert isinstance(block, TransformerBlock)
    if part == "attention":
        return hook_attention(block.attn, edit, reads_only)
    if part.startswith("head."):
        return [edit_head(block.attn, int(part.removeprefix("head.")), edit)]
    return [edit_output({"attn_out": block.attn, "mlp_out": block.mlp}.get(part, block), edit)]


def edit_output(module: nn.Module, edit: Edit) -> RemovableHandle:
    return module.register_forward_hook(lambda module, arguments, output: edit(output))


def edit_head(attn: MultiHeadAttention, head: int, edit: Edit) -> RemovableHandle:
    """A head's own columns of what `attn_out` reads."""

    def replace(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        heads = list(arguments[0].chunk(attn.n_heads, dim=-1))  # each (batch, tokens, head_dim)
        new = edit(heads[head])
        if new is heads[head]:  # only looked at
            return arguments
        heads[head] = new
        return (torch.cat(heads, dim=-1),)

    return attn.attn_out.register_forward_pre_hook(replace)


def hook_attention(attn: MultiHeadAttention, edit: Edit, reads_only: bool) -> list[RemovableHandle]:
    """Attention weights are seen, and replaced, just before `attn_out` reads what they gathered."""
    patch = AttentionPatch(attn, edit)
    before = attn.register_forward_pre_hook(patch.remember)
    return [before, attn.attn_out.register_forward_pre_hook(patch.read if reads_only else patch)]


class AttentionPatch:
    """Attention in plain steps, with `edit` between the weights and the values."""

    def __init__(self, attn: MultiHeadAttention, edit: Edit) -> None:
        self.attn, self.edit = attn, edit
        self.call: tuple[Any, ...] = ()  # x, attn_mask, cache of the pass that is under way
        self.weights = torch.empty(0)  # those of the pass before, after `edit`

    def remember(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.call = (*arguments, None, None)[:3]

    def read(self, module: nn.Module, arguments: tuple[Tensor]) -> None:
        """The weights in use: if somebody has patched them, the patched ones."""
        hooks = self.attn.attn_out._forward_pre_hooks.values()
        patches = [hook.weights for hook in hooks if isinstance(hook, AttentionPatch)]
        self.edit(attention_weights(self.attn, *self.call) if not patches else patches[-1])

    def __call__(self, module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        self.weights = self.edit(attention_weights(self.attn, *self.call))
        _, _, values = queries_keys_values(self.attn, self.call[0], self.call[2])
        context = self.weights.to(values.dtype) @ values  # (batch, heads, tokens, head_dim)
        return (context.transpose(1, 2).flatten(2),)


def attention_weights(
    attn: MultiHeadAttention,
    x: Float[Tensor, "batch tokens emb"],
    attn_mask: Bool[Tensor, "#batch 1 tokens total"] | None = None,
    cache: LayerCache | None = None,
) -> Float[Tensor, "batch heads tokens total"]:
    """softmax(query @ key.T / sqrt(head_dim)), which the fast kernel computes piece by piece.

    x: what the layer reads, the stream after `norm1`. attn_mask: as the layer's own; None is the
    plain causal pattern. A cache must hold the keys of x already. In float32 or better.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    query, key, _ = queries_keys_values(attn, x, cache)
    with torch.autocast(x.device.type, enabled=False):
        scores = query.to(wide) @ key.to(wide).mT  # (batch, heads, tokens, total)
    scores = scores / math.sqrt(query.shape[3])
    if attn_mask is None:
        tokens, total = scores.shape[2:]
        attn_mask = scores.new_ones(tokens, total, dtype=torch.bool).tril(total - tokens)
    return scores.masked_fill(~attn_mask, -math.inf).softmax(dim=3)


def queries_keys_values(
    attn: MultiHeadAttention, x: Tensor, cache: LayerCache | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of x, (batch, heads, tokens, head_dim); keys and values of all tokens that can be
    looked at, (batch, heads, total, head_dim): those in the cache, which holds x's already."""
    query, key, value = map(attn.split_heads, attn.project(x))
    if cache is not None:
        key, value = cache.keys[:, :, : cache.length], cache.values[:, :, : cache.length]
    return query, key, value
