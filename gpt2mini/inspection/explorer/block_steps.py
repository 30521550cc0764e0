"""The vectors of one text on its way through each block, as a forward pass makes them.

`trace` has names for what a block adds to the residual stream. The page's step by step shows more:
what the norms give, the queries, keys and values, the hidden layer of the MLP.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gpt2mini.inspection.attention_calls import AttentionCall
from gpt2mini.inspection.tracing import Trace
from gpt2mini.model import GPT2

Step = dict[str, Float[Tensor, "tokens _"]]


@contextmanager
def observed_steps(model: GPT2, steps: list[Step]) -> Iterator[None]:
    """Inside, a forward pass of one text writes the vectors that `trace` has no name for into
    `steps`, a dict for each block. A block of your own may lack some."""
    with ExitStack() as hooks:
        for block, step in zip(model.trf_blocks, steps, strict=True):
            for module, name, of_input in (
                ("norm1", "norm1", False),
                ("norm2", "middle", True),
                ("norm2", "norm2", False),
                ("mlp.mlp_out", "hidden", True),
            ):
                if has_submodule(block, module):
                    hook = keep_vectors(step, name, of_input)
                    hooks.enter_context(block.get_submodule(module).register_forward_hook(hook))
        calls = hooks.enter_context(AttentionCalls(model.config.n_heads))
        yield
    for call, step in zip(calls.found, steps, strict=False):
        key, value = (call.for_each_query_head(x) for x in (call.key, call.value))
        for name, x in (("query", call.query), ("key", key), ("value", value)):
            step[name] = x[0].transpose(0, 1).flatten(1).detach().float()  # (tokens, emb)


def has_submodule(module: nn.Module, path: str) -> bool:
    return path in dict(module.named_modules())


def keep_vectors(step: Step, name: str, of_input: bool) -> Any:
    """A forward hook that keeps a module's input or output."""

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        step[name] = (arguments[0] if of_input else output)[0].detach().float().clone()

    return keep


class AttentionCalls(TorchFunctionMode):
    """Keeps the arguments of each call of `F.scaled_dot_product_attention` with so many heads."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.found: list[AttentionCall] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            call = AttentionCall(*args, **(kwargs or {}))
            if call.query.ndim == 4 and call.query.shape[1] == self.n_heads:
                self.found.append(call)
        return func(*args, **(kwargs or {}))


def complete_steps(steps: list[Step], found: Trace, n_heads: int) -> None:
    """Add what `trace` has found. Raises ValueError for what it could not observe."""
    stream = found["embedding"][0]
    for layer, step in enumerate(steps):
        heads = [found[f"blocks.{layer}.head.{head}"][0] for head in range(n_heads)]
        step["before"], step["context"] = stream, torch.cat(heads, dim=1)
        for part in ("attn_out", "mlp_out", "stream"):
            step[part] = found[f"blocks.{layer}.{part}"][0]
        stream = step["stream"]
