"""One self-contained HTML page on which a model and a text can be explored: no network, no server.

    python -m gpt2mini explore --model gpt2 --text "The old keeper lit the lamp" --out page.html

The page is explorer.html, plain HTML, CSS and JavaScript, with the numbers put in as JSON. All of
them are the model's: attention rounded to 1/65535, the rest to four or five digits.
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

from gpt2mini.files import write_text
from gpt2mini.inspection.lens import logit_lens
from gpt2mini.inspection.plots import token_labels
from gpt2mini.inspection.tracing import Trace, trace
from gpt2mini.model import GPT2, MLP, MultiHeadAttention, TiedHead, TransformerBlock
from gpt2mini.tokenizer import Tokenizer

MOST_TOKENS = 128  # attention grows with the square: 64 tokens on 124M make a page of a megabyte
TEMPLATE = Path(__file__).with_name("explorer.html")


def write_page(
    model: GPT2, tokenizer: Tokenizer, text: str, path: str | Path, name: str = "GPT-2"
) -> None:
    """Write the page of a model (called `name` on it) reading a text.

    Raises ValueError for an empty text, one of more than 128 tokens, and a head of one's own.
    """
    data = json.dumps(page_data(model, tokenizer, text, name), separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # no text can end the script element that holds it
    page = TEMPLATE.read_text(encoding="utf-8")
    title = html.escape(f"{name}: inside a GPT-2")
    write_text(Path(path), page.replace("{{title}}", title).replace("{{data}}", data))


def page_data(model: GPT2, tokenizer: Tokenizer, text: str, name: str) -> dict[str, Any]:
    """Everything that the page shows, ready for JSON."""
    ids = tokenizer.encode(text)
    if not 1 <= len(ids) <= MOST_TOKENS:
        raise ValueError(f"the page shows from 1 to {MOST_TOKENS} tokens; the text has {len(ids)}")
    token_ids = torch.tensor([ids], device=model.tok_emb.weight.device)
    found = trace(model, token_ids)
    logits = found["logits"][0, -1].float().cpu()  # (vocab)
    if len(logits) != model.config.vocab_size:
        raise ValueError(f"a head of {len(logits)} outputs predicts no tokens: is it a classifier?")
    best = logits.topk(min(20, len(logits)))
    return {
        "name": name,
        "config": {key: getattr(model.config, key) for key in ("n_layers", "n_heads", "emb_dim")},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "boxes": boxes(model, len(ids)),
        "tokens": token_labels(tokenizer, ids),
        "token_ids": ids,
        "attention": packed_attention(found),
        "lens": lens_rows(model, tokenizer, token_ids),
        "lengths": lengths(found),
        "next": {
            "tokens": token_labels(tokenizer, best.indices.tolist()),
            "logits": packed(logits.sort(descending=True).values, "<f4"),
        },
    }


def packed_attention(found: Trace) -> str:
    """(layer, head, row, column up to the row) as 16-bit shares of 65535, in base64."""
    layers = torch.stack(found.of_each_block("attention"))[:, 0].cpu()  # (layers, heads, t, t)
    rows, columns = torch.tril_indices(*layers.shape[2:])
    return packed((layers[:, :, rows, columns] * 65535).round(), "<u2")


def packed(numbers: Tensor, dtype: str) -> str:
    return base64.b64encode(numbers.numpy().astype(dtype).tobytes()).decode()


def lens_rows(model: GPT2, tokenizer: Tokenizer, token_ids: Tensor) -> list[Any]:
    """Layer by layer, at each position: [token, probability] of the five likeliest."""
    lens = logit_lens(model, token_ids, k=5)
    return [
        [
            [[label, round(p, 5)] for label, p in zip(token_labels(tokenizer, i), ps, strict=True)]
            for i, ps in zip(of_layer[0].tolist(), shares[0].tolist(), strict=True)
        ]
        for of_layer, shares in zip(lens.token_ids, lens.probabilities, strict=True)
    ]


def lengths(found: Trace) -> dict[str, list[list[float]]]:
    """Lengths of each token's vectors: of the stream after each layer, and of what is added."""
    parts = {part: found.of_each_block(part) for part in ("attn_out", "mlp_out", "stream")}
    parts["stream"] = [found["embedding"], *parts["stream"]]
    return {
        part: [[round(number, 4) for number in x[0].float().norm(dim=1).tolist()] for x in layers]
        for part, layers in parts.items()
    }


# ---- the diagram: what each box of it opens to


WHAT_IT_DOES = {
    "Embedding": "A vector for each token and one for each position, added: the stream begins.",
    "Block": "Both parts read the stream and add to it; it passes by unchanged.",
    "Attention": "After norm1, every token gathers what it needs from itself and those before it.",
    "MLP": "After norm2, every token on its own: widen fourfold, bend, narrow.",
    "Final norm": "Bring each vector to mean 0 and spread 1, then scale and shift.",
    "Output head": "Compare each vector with every token's: the closer, the likelier it is next.",
}


def boxes(model: GPT2, tokens: int) -> list[dict[str, Any]]:
    """The parts of the architecture in the order of a forward pass; `in_block` ones repeat."""
    emb, heads, vocab = model.config.emb_dim, model.config.n_heads, model.config.vocab_size
    stream = f"({tokens}, {emb})"
    by_head = f"{stream}, in {heads} heads ({heads}, {tokens}, {emb // heads}), and back"
    widened = f"{stream}, widened to ({tokens}, {4 * emb}), and back"
    block = model.trf_blocks[0]
    assert isinstance(block, TransformerBlock)
    embedding = lines_of(GPT2.embed, "x = self.tok_emb(", 2)
    final_norm = lines_of(GPT2.hidden_states, "return self.final_norm(", 1)
    tied = isinstance(model.out_head, TiedHead)
    head = source_of(TiedHead) if tied else lines_of(GPT2.forward, "return self.out_head(", 1)
    attention = source_of(MultiHeadAttention.forward, MultiHeadAttention.project)
    of_model, of_block = partial(parameters_of, model), partial(parameters_of, block)
    both = of_block("norm1", "attn", "norm2", "mlp")
    return [
        box("Embedding", f"({tokens}) -> {stream}", of_model("tok_emb", "pos_emb"), embedding),
        box("Block", stream, both, source_of(TransformerBlock.forward), in_block=True),
        box("Attention", by_head, of_block("norm1", "attn"), attention, in_block=True),
        box("MLP", widened, of_block("norm2", "mlp"), source_of(MLP), in_block=True),
        box("Final norm", stream, of_model("final_norm"), final_norm),
        box("Output head", f"{stream} -> ({tokens}, {vocab})", of_model("out_head"), head),
    ]


def parameters_of(owner: nn.Module, *parts: str) -> dict[str, list[int]]:
    """The shapes of the parameters of these parts of a module, by their names in it."""
    named = owner.named_parameters()
    return {name: list(p.shape) for name, p in named if name.split(".")[0] in parts}


def box(
    title: str,
    shape: str,
    parameters: dict[str, list[int]],
    source: tuple[int, str],
    in_block: bool = False,
) -> dict[str, Any]:
    first, code = source
    return {
        "title": title,
        "text": WHAT_IT_DOES[title],
        "shape": shape,
        "parameters": parameters,
        "first_line": first,
        "code": code,
        "in_block": in_block,
    }


def source_of(*parts: Any) -> tuple[int, str]:
    """(the first line in model.py, the lines) of functions or classes that follow one another."""
    sources = [inspect.getsourcelines(part) for part in parts]
    code = "\n".join("".join(lines) for lines, _ in sources)
    return sources[0][1], dedent(code).rstrip()


def lines_of(function: Any, beginning: str, n: int) -> tuple[int, str]:
    """The n lines of a function from the one that begins so."""
    lines, first = inspect.getsourcelines(function)
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith(beginning))
    return first + start, "\n".join(line.strip() for line in lines[start : start + n])
