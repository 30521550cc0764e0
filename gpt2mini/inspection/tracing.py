"""Observe and replace what a forward pass computes: every activation by its name.

    activations = trace(model, token_ids)
    activations["blocks.3.attention"]                        # (batch, heads, tokens, tokens)
    with patched(model, {"blocks.3.head.5": 0}):             # ablate a head
        logits = model(token_ids)
    with patched(model, {"blocks.2.stream": activations["blocks.2.stream"]}):
        logits = model(other_ids)                            # activation patching

The names, in the order of a forward pass:

    embedding           what the first block reads                   (batch, tokens, emb)
    blocks.3.attention  attention weights: each row sums to 1        (batch, heads, tokens, total)
    blocks.3.head.5     output of head 5: its weights times values   (batch, tokens, head_dim)
    blocks.3.attn_out   what attention adds to the residual stream   (batch, tokens, emb)
    blocks.3.mlp_out    what the MLP adds to the residual stream     (batch, tokens, emb)
    blocks.3.stream     the residual stream after the block          (batch, tokens, emb)
    final_norm          what the output head reads                   (batch, tokens, emb)
    logits              what the model returns                       (batch, tokens, vocab)

Modules are observed by forward hooks, attention weights and heads where the block calls
`F.scaled_dot_product_attention` (attention_calls.py). So the activations are those of the model as
it is, adapters, replaced layers and hooks of your own included.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from gpt2mini.config import GPT2Config
from gpt2mini.inspection.attention_calls import Edit, edited_attention
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating

Patch = float | Tensor | Edit


@dataclass(frozen=True)
class Trace:
    """The activations of one forward pass by their names (above), in the order of the pass."""

    activations: dict[str, Tensor]
    not_observed: Mapping[str, str] = field(default_factory=dict)  # name -> what it would need

    def __getitem__(self, name: str) -> Tensor:
        if name in self.not_observed:
            raise ValueError(self.not_observed[name])
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
        names = [*self.activations, *self.not_observed]
        found = [self[name] for name in names if fnmatchcase(name, f"blocks.*.{part}")]
        if not found:
            raise ValueError(f"no block has {part!r} in the trace, which has {listed(self.names)}")
        return found


def trace(
    model: GPT2,
    token_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
    names: Sequence[str] = ("*",),
) -> Trace:
    """The activations of one forward pass in eval mode and without gradients.

    names: what to keep, `*` standing for anything, as in "blocks.*.stream". All activations of a
    long text need much memory: each block has heads x tokens x tokens attention weights.
    Raises ValueError for unknown names, for input that the model refuses, and for a name that
    cannot be observed in this model: a block of your own may compute attention without
    `F.scaled_dot_product_attention`. Where a `*` matches such a name, reading it raises.
    """
    wanted = matching_names(model.config, names)
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}

    def keep(name: str) -> Edit:
        def edit(x: Tensor) -> Tensor:
            found[name].append(x.detach().clone())  # a later layer may write into it
            return x

        return edit

    with evaluating(model), ExitStack() as edits:
        for name in wanted:
            edits.enter_context(edited(model, name, keep(name)))
        # What the model returns, even if it does more after its output head.
        found["logits"] = [model(token_ids, attention_mask)]
    not_observed = {name: requirement(model, name) for name in wanted if len(found[name]) != 1}
    for name in [names] if isinstance(names, str) else names:
        if name in not_observed:
            raise ValueError(not_observed[name])
    activations = {name: found[name][0] for name in wanted if name not in not_observed}
    return Trace(activations, not_observed)


@contextmanager
def patched(model: GPT2, patches: Mapping[str, Patch]) -> Iterator[GPT2]:
    """Inside, the named activations are replaced in every forward pass: ablation and patching.

    A patch is a number (0 ablates), a tensor that has or broadcasts to the activation's shape, or a
    function of the activation. Gradients flow through it. Patches of attention weights come before
    those of heads; of two patches of one activation, in nested `with`, the inner one reads what the
    outer one returns. A patch of the logits replaces the output of the output head, in losses that
    apply it in chunks too.
    Raises ValueError for an unknown name, and in the forward pass for a shape that does not fit and
    for an activation that cannot be observed in this model.
    """
    known = activation_names(model.config)
    if unknown := [name for name in patches if name not in known]:
        raise ValueError(f"no activation is called {unknown[0]!r}; there are {listed(known)}")
    with ExitStack() as edits:
        for name in (name for name in known if name in patches):
            edit = as_edit(name, patches[name])
            in_block = name.startswith("blocks.")
            edits.enter_context((edited_once if in_block else edited)(model, name, edit))
        yield model


def as_edit(name: str, patch: Patch) -> Edit:
    """A patch as a function that returns the activation's replacement, in its shape and dtype."""

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
    """Names for a message; of many blocks, and of many heads, the first and the last."""
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


def edited(model: GPT2, name: str, edit: Edit) -> AbstractContextManager[Any]:
    """Inside, `edit` reads and replaces the named activation in every forward pass."""
    if name == "embedding":
        return edited_input(model.trf_blocks[0], edit)
    if name == "final_norm":
        return edited_output(model.final_norm, edit)
    if name == "logits":
        return edited_output(model.out_head, edit)
    block, part = block_and_part(model, name)
    if part == "stream":
        return edited_output(block, edit)
    if part in ("attn_out", "mlp_out"):
        module = getattr(block, part.removesuffix("_out"), None)
        return nullcontext() if module is None else edited_output(module, edit)
    head = int(part.removeprefix("head.")) if part.startswith("head.") else None
    return edited_attention(block, model.config.n_heads, edit, head)


def edited_input(module: nn.Module, edit: Edit) -> AbstractContextManager[Any]:
    return module.register_forward_pre_hook(
        lambda module, arguments: (edit(arguments[0]), *arguments[1:])
    )


def edited_output(module: nn.Module, edit: Edit) -> AbstractContextManager[Any]:
    return module.register_forward_hook(lambda module, arguments, output: edit(output))


def block_and_part(model: GPT2, name: str) -> tuple[nn.Module, str]:
    _, layer, part = name.split(".", 2)
    return model.trf_blocks[int(layer)], part


@contextmanager
def edited_once(model: GPT2, name: str, edit: Edit) -> Iterator[None]:
    """`edited`, which raises ValueError in a forward pass of the block that does not compute the
    activation exactly once: the edit would change nothing, or only a part."""
    block, _ = block_and_part(model, name)
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return edit(x)

    def start(block: nn.Module, arguments: Any) -> None:
        nonlocal calls
        calls = 0

    def check(block: nn.Module, arguments: Any, output: Any) -> None:
        if calls != 1:
            raise ValueError(requirement(model, name))

    with (
        block.register_forward_pre_hook(start),
        edited(model, name, counted),
        block.register_forward_hook(check),
    ):
        yield


def requirement(model: GPT2, name: str) -> str:
    """What a model must do so that an activation can be observed, as an error's message."""
    if not name.startswith("blocks."):
        return f"{name} cannot be observed: a forward pass must compute it exactly once"
    block, part = block_and_part(model, name)
    if part == "stream":
        must = "run exactly once in a forward pass of the model"
    elif part in ("attn_out", "mlp_out"):
        must = f"have a module {part.removesuffix('_out')!r} and call it exactly once"
    else:
        must = (
            "call F.scaled_dot_product_attention exactly once, with a query of the shape "
            f"(batch, {model.config.n_heads}, tokens, head_dim)"
        )
    owner = name.removesuffix(f".{part}")
    return f"{name} cannot be observed: {owner}, a {type(block).__name__}, must {must}"
