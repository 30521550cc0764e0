"""The parts of a GPT-2 as the page shows them: shapes, parameters and the lines of source code.

The source is that of the model's own classes, so a part of your own is shown as you wrote it.
"""

import inspect
import math
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

from torch import nn

from gpt2mini.model import GPT2

TITLES = {
    "embedding": "Embedding",
    "block": "Block",
    "attention": "Attention",
    "mlp": "MLP",
    "final_norm": "Final norm",
    "out_head": "Output head",
}
DESCRIPTIONS = {
    "embedding": "A vector for each token plus one for each position: the residual stream begins.",
    "block": "Attention and the MLP both read the residual stream and add their outputs to it.",
    "attention": "After norm1, every token mixes in values of itself and of the tokens before it.",
    "mlp": "After norm2, for every token by itself: linear to 4 emb, GELU, linear to emb.",
    "final_norm": "Normalize each vector to mean 0 and variance 1, then scale and shift.",
    "out_head": "The product with each token's vector: the logits of the next token.",
}


def parts(model: GPT2) -> list[dict[str, Any]]:
    """The parts in the order of a forward pass, ready for JSON; `in_block` ones repeat.

    Shapes are written with the name of the axis `tokens`, as in "(tokens, 256)".
    """
    emb, heads, vocab = model.config.emb_dim, model.config.n_heads, model.config.vocab_size
    stream = f"(tokens, {emb})"
    by_head = f"{stream}, in {heads} heads ({heads}, tokens, {emb // heads}), and back"
    widened = f"{stream}, widened to (tokens, {4 * emb}), and back"
    block = model.trf_blocks[0]
    attn, mlp = block.get_submodule("attn"), block.get_submodule("mlp")
    of_model, of_block = partial(parameters_of, model), partial(parameters_of, block)
    both = of_block("norm1", "attn", "norm2", "mlp")
    head = GPT2.forward if type(model.out_head) is nn.Linear else type(model.out_head)
    final_norm = of_model("final_norm")
    return [
        part("embedding", f"(tokens) -> {stream}", of_model("tok_emb", "pos_emb"), GPT2.embed),
        part("block", stream, both, type(block).forward, in_block=True),
        part("attention", by_head, of_block("norm1", "attn"), type(attn).forward, in_block=True),
        part("mlp", widened, of_block("norm2", "mlp"), type(mlp).forward, in_block=True),
        part("final_norm", stream, final_norm, GPT2.hidden_states),
        part("out_head", f"{stream} -> (tokens, {vocab})", of_model("out_head"), head),
    ]


def parameters_of(owner: nn.Module, *names: str) -> dict[str, list[int]]:
    """The shapes of the parameters of these parts of a module, by their names in it."""
    named = owner.named_parameters()
    return {name: list(p.shape) for name, p in named if name.split(".")[0] in names}


def part(
    key: str, shape: str, parameters: dict[str, list[int]], shown: Any, in_block: bool = False
) -> dict[str, Any]:
    """shown: the function or class whose source is shown."""
    file, first_line, code = source_of(shown)
    return {
        "key": key,
        "title": TITLES[key],
        "text": DESCRIPTIONS[key],
        "shape": shape,
        "parameters": parameters,
        "n_parameters": sum(math.prod(shape) for shape in parameters.values()),
        "file": file,
        "first_line": first_line,
        "code": code,
        "in_block": in_block,
    }


def source_of(shown: Any) -> tuple[str, int, str]:
    """(name of the file, first line, source) of a function or class."""
    try:
        lines, first_line = inspect.getsourcelines(shown)
        file = Path(inspect.getsourcefile(inspect.unwrap(shown)) or "").name
    except OSError:  # defined in an interactive session
        return shown.__module__, 1, f"# {shown.__qualname__}: no source file"
    return file, first_line, dedent("".join(lines)).rstrip()
