"""A self-contained HTML page to explore a model on a text, without network or server.

    gpt2mini explore --model gpt2 --text "The old keeper lit the lamp" --out page.html

The page is explorer.html, plain HTML, CSS and JavaScript, with the model's activations as JSON:
attention weights rounded to 1/65535, the rest to four or five decimals.
"""

import base64
import html
import inspect
import json
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

import torch
from torch import Tensor, nn

from gpt2mini.checks import check_predicts_tokens
from gpt2mini.files import write_text
from gpt2mini.inspection.lens import logit_lens
from gpt2mini.inspection.plots import token_labels
from gpt2mini.inspection.tracing import Trace, trace
from gpt2mini.model import GPT2
from gpt2mini.tokenizer import Tokenizer

MOST_TOKENS = 128  # attention grows with the square: 64 tokens on 124M make a page of a megabyte
TEMPLATE = Path(__file__).with_name("explorer.html")


def write_page(
    model: GPT2, tokenizer: Tokenizer, text: str, path: str | Path, name: str = "GPT-2"
) -> None:
    """Write the page of a model, titled `name`, on a text.

    Raises ValueError for an empty text, one of more than 128 tokens, a classifier, and a model
    whose activations `trace` cannot observe.
    """
    data = json.dumps(page_data(model, tokenizer, text, name), separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # no text can end the script element that holds it
    page = TEMPLATE.read_text(encoding="utf-8")
    title = html.escape(f"{name}: inside a GPT-2")
    write_text(Path(path), page.replace("{{title}}", title).replace("{{data}}", data))


def page_data(model: GPT2, tokenizer: Tokenizer, text: str, name: str) -> dict[str, Any]:
    """All that the page shows, ready for JSON."""
    check_predicts_tokens(model)
    ids = tokenizer.encode(text)
    if not 1 <= len(ids) <= MOST_TOKENS:
        raise ValueError(f"the page shows from 1 to {MOST_TOKENS} tokens; the text has {len(ids)}")
    token_ids = torch.tensor([ids], device=model.tok_emb.weight.device)
    found = trace(model, token_ids)
    logits = found["logits"][0, -1].float().cpu()  # (vocab)
    known = sorted(set(range(len(logits))) & {*tokenizer.vocab.values()})
    likeliest = logits[known].sort(descending=True)  # (known)
    best = [known[i] for i in likeliest.indices[:20].tolist()]
    attention, norms = packed_attention(found), vector_norms(found)
    return {
        "name": name,
        "config": {key: getattr(model.config, key) for key in ("n_layers", "n_heads", "emb_dim")},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "boxes": boxes(model, len(ids)),
        "tokens": token_labels(tokenizer, ids),
        "token_ids": ids,
        "attention": attention,
        "lens": lens_rows(model, tokenizer, token_ids),
        "norms": norms,
        "next": {
            "tokens": token_labels(tokenizer, best),
            "logits": packed(likeliest.values, "<f4"),
        },
    }


def packed_attention(found: Trace) -> str:
    """Weights times 65535 as 16-bit integers (layer, head, row, column <= row), in base64."""
    layers = torch.stack(found.of_each_block("attention"))[:, 0].cpu()  # (layers, heads, t, t)
    rows, columns = torch.tril_indices(*layers.shape[2:])
    return packed((layers[:, :, rows, columns] * 65535).round(), "<u2")


def packed(numbers: Tensor, dtype: str) -> str:
    return base64.b64encode(numbers.numpy().astype(dtype).tobytes()).decode()


def lens_rows(model: GPT2, tokenizer: Tokenizer, token_ids: Tensor) -> list[Any]:
    """For each layer and position, [token, probability] of the five most likely tokens."""
    missing = tokenizer.missing_ids(model.config.vocab_size)
    lens = logit_lens(model, token_ids, k=5, forbidden_ids=missing)
    return [
        [
            [[label, round(p, 5)] for label, p in zip(token_labels(tokenizer, i), ps, strict=True)]
            for i, ps in zip(of_layer[0].tolist(), shares[0].tolist(), strict=True)
        ]
        for of_layer, shares in zip(lens.token_ids, lens.probabilities, strict=True)
    ]


def vector_norms(found: Trace) -> dict[str, list[list[float]]]:
    """Norms of each token's vectors: of the stream after each layer, and of what is added."""
    parts = {part: found.of_each_block(part) for part in ("attn_out", "mlp_out", "stream")}
    parts["stream"] = [found["embedding"], *parts["stream"]]
    return {
        part: [[round(number, 4) for number in x[0].float().norm(dim=1).tolist()] for x in layers]
        for part, layers in parts.items()
    }


# ---- the architecture: parts in the order of a forward pass


DESCRIPTIONS = {
    "Embedding": "A vector for each token plus one for each position: the residual stream begins.",
    "Block": "Attention and the MLP both read the residual stream and add their outputs to it.",
    "Attention": "After norm1, every token mixes in values of itself and of the tokens before it.",
    "MLP": "After norm2, for every token by itself: linear to 4 emb, GELU, linear to emb.",
    "Final norm": "Normalize each vector to mean 0 and variance 1, then scale and shift.",
    "Output head": "The product with each token's vector: the logits of the next token.",
}


def boxes(model: GPT2, tokens: int) -> list[dict[str, Any]]:
    """The parts of the architecture in the order of a forward pass; `in_block` ones repeat."""
    emb, heads, vocab = model.config.emb_dim, model.config.n_heads, model.config.vocab_size
    stream = f"({tokens}, {emb})"
    by_head = f"{stream}, in {heads} heads ({heads}, {tokens}, {emb // heads}), and back"
    widened = f"{stream}, widened to ({tokens}, {4 * emb}), and back"
    block = model.trf_blocks[0]
    attn, mlp = block.get_submodule("attn"), block.get_submodule("mlp")
    of_model, of_block = partial(parameters_of, model), partial(parameters_of, block)
    both = of_block("norm1", "attn", "norm2", "mlp")
    head = GPT2.forward if type(model.out_head) is nn.Linear else type(model.out_head)
    return [
        box("Embedding", f"({tokens}) -> {stream}", of_model("tok_emb", "pos_emb"), GPT2.embed),
        box("Block", stream, both, type(block).forward, in_block=True),
        box("Attention", by_head, of_block("norm1", "attn"), type(attn).forward, in_block=True),
        box("MLP", widened, of_block("norm2", "mlp"), type(mlp).forward, in_block=True),
        box("Final norm", stream, of_model("final_norm"), GPT2.hidden_states),
        box("Output head", f"{stream} -> ({tokens}, {vocab})", of_model("out_head"), head),
    ]


def parameters_of(owner: nn.Module, *parts: str) -> dict[str, list[int]]:
    """The shapes of the parameters of these parts of a module, by their names in it."""
    named = owner.named_parameters()
    return {name: list(p.shape) for name, p in named if name.split(".")[0] in parts}


def box(
    title: str, shape: str, parameters: dict[str, list[int]], shown: Any, in_block: bool = False
) -> dict[str, Any]:
    """shown: the function or class whose source the box shows."""
    file, first_line, code = source_of(shown)
    return {
        "title": title,
        "text": DESCRIPTIONS[title],
        "shape": shape,
        "parameters": parameters,
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
