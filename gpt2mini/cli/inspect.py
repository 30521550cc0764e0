"""Look inside a model: activations, attention, predictions by layer, and what training changed.

Examples:
  gpt2mini inspect trace --text "The capital of France is"
  gpt2mini inspect attention --layer 5
  gpt2mini inspect lens --model gpt2
  gpt2mini inspect lens --adapter runs/finetune/best
  gpt2mini inspect compare --model gpt2 --other runs/finetune/best

trace      sizes of what every block adds to the residual stream, names and shapes of activations
attention  where each head looks, and which heads look back, to the start, or continue patterns
lens       the next token that the residual stream predicts after each block
compare    differences to another model, in weights and in activations

Prints what it finds and writes it to --out: pictures (PNG) and figures (JSON).
"""

import os
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tyro.conf import Positional

from gpt2mini import GPT2, Tokenizer
from gpt2mini.checkpoints import holds_adapter
from gpt2mini.cli import common, models, options
from gpt2mini.data.samples import sample
from gpt2mini.device import pick_device
from gpt2mini.files import writable_folder, write_json
from gpt2mini.inspection import (
    HeadScores,
    Trace,
    compare_models,
    head_scores,
    logit_lens,
    plot_attention,
    plot_change,
    plot_head_scores,
    plot_lens,
    plot_trace,
    score_text,
    surprise_legend,
    surprise_text,
    token_labels,
    trace,
)
from gpt2mini.inspection.comparison_table import layer_of
from gpt2mini.lora import load_adapter
from gpt2mini.losses import next_token_loss
from gpt2mini.preferences.comparison import end_of
from gpt2mini.sampling import FORBIDDEN
from gpt2mini.training import adamw


@dataclass(frozen=True)
class LayerFlags:
    """With trace and attention."""

    layer: options.OptionalCountOrZero = (
        None  # one block, from 0; None: all, or the most telling one
    )


@dataclass(frozen=True)
class CompareFlags:
    """With compare."""

    other: str | None = None  # a model's or an adapter's folder; None: 10 steps of training
    rows: options.Count = 8  # rows per table


@dataclass(frozen=True)
class Flags:
    what: Positional[Literal["trace", "compare", "attention", "lens"]]  # what to look at
    model: str = "gpt2-nano"  # a model's folder or name
    adapter: str | None = None  # folder of an adapter that was trained on --model
    text: str = "The old keeper lit the lamp. Then the old keeper"  # what the model reads
    out: str = "runs/inspect"  # folder for results
    layers: LayerFlags = options.group(LayerFlags, "inspect trace", "inspect attention")
    comparison: CompareFlags = options.group(CompareFlags, "inspect compare")
    computing: options.Computing = options.group(options.Computing)

    @property
    def name(self) -> str:
        """Of the model, for headings."""
        return models.describe(self.model, self.adapter)

    @property
    def conditions(self) -> set[str]:
        return {f"inspect {self.what}"}


def run(flags: Flags) -> None:
    if not flags.text:
        raise ValueError("the text is empty: there is nothing to look at")
    writable_folder(flags.out)
    torch.manual_seed(flags.computing.seed)
    device = pick_device(flags.computing.device)
    model, tokenizer = models.load(flags.model, flags.adapter, device)
    layers, layer = model.config.n_layers, flags.layers.layer
    if layer is not None and layer >= layers:
        raise ValueError(f"--layer must be from 0 to {layers - 1}, not {layer}")
    token_ids = torch.tensor([tokenizer.encode(flags.text)], device=device)
    show = {
        "trace": show_trace,
        "compare": show_comparison,
        "attention": show_attention,
        "lens": show_lens,
    }
    show[flags.what](model, tokenizer, token_ids, flags)


# ---- trace


def show_trace(model: GPT2, tokenizer: Tokenizer, token_ids: Tensor, flags: Flags) -> None:
    """Lengths of what every block adds to the stream, and what comes out at the end."""
    found = trace(model, token_ids)
    rows = stream_lengths(found, model.config.n_layers)
    print("Length of a token's vector (median), block by block\n")
    print(f"{'':<10}{'attention adds':>16}{'MLP adds':>12}{'stream':>12}")
    print(f"{'embedding':<10}{'':>28}{length(found['embedding']):>12.2f}")
    for row in rows if flags.layers.layer is None else [rows[flags.layers.layer]]:
        lengths = f"{row['attn_out']:>16.2f}{row['mlp_out']:>12.2f}{row['stream']:>12.2f}"
        print(f"{'block ' + str(row['layer']):<10}{lengths}")
    following: dict[str, float] = {}
    if found["logits"].shape[2] == model.config.vocab_size:  # a classifier names no next token
        logits = found["logits"][0, -1].float().cpu()  # (vocab)
        missing = torch.tensor(tokenizer.missing_ids(len(logits)), dtype=torch.long)
        best = logits.index_fill(0, missing, FORBIDDEN).softmax(dim=0).topk(5)
        labels = token_labels(tokenizer, best.indices.tolist())
        following = dict(zip(labels, best.values.tolist(), strict=True))
        print(f"\nAfter {end_of(flags.text, 60)!r}:")
        for token, probability in following.items():
            print(f"  {token:<20} {probability:6.1%}")
    print(f"\nNames in the trace, {len(found)} in all:")
    for name in (name for name in found if not name.startswith("blocks.") or ".0." in name):
        print(f"  {name:<20} {tuple(found[name].shape)}")
    shapes = {name: list(found[name].shape) for name in found}
    contents = {"text": flags.text, "lengths": rows, "next_token": following, "shapes": shapes}
    title = f"What the blocks of {flags.name} add"
    write(flags, contents, trace=lambda path: plot_trace(found, path, title))


def stream_lengths(found: Trace, n_layers: int) -> list[dict[str, float]]:
    parts = ("attn_out", "mlp_out", "stream")
    return [
        {"layer": i} | {part: length(found[f"blocks.{i}.{part}"]) for part in parts}
        for i in range(n_layers)
    ]


def length(x: Tensor) -> float:
    """The median over the tokens: the first one's vector is often far longer than all others."""
    return float(x.float().norm(dim=2).median())


# ---- attention


def show_attention(model: GPT2, tokenizer: Tokenizer, token_ids: Tensor, flags: Flags) -> None:
    """The heads that look one token back, to the first token, or continue patterns; and the weights
    of one block."""
    scores = head_scores(
        model, min(32, model.config.context_length // 2), seed=flags.computing.seed
    )
    print_strongest(scores)
    layer = (
        scores.strongest("induction", 1)[0][0] if flags.layers.layer is None else flags.layers.layer
    )
    name = f"blocks.{layer}.attention"
    attention = trace(model, token_ids, names=[name])[name][0]  # (heads, tokens, tokens)
    labels = token_labels(tokenizer, token_ids[0].tolist())
    print_last_looks(attention, labels, layer)
    contents = {"text": flags.text, "tokens": labels, "layer": layer}
    contents["attention"] = attention.tolist()
    contents |= {kind: getattr(scores, kind).tolist() for kind in kinds_of(scores)}
    title = f"Attention of {flags.name}, block {layer}"
    of_heads = f"Heads of {flags.name} on repeated random tokens"
    write(
        flags,
        contents,
        attention=lambda path: plot_attention(attention, labels, path, title, layer),
        heads=lambda path: plot_head_scores(scores, path, of_heads),
    )


def kinds_of(scores: HeadScores) -> list[str]:
    return [field.name for field in fields(scores)]


def print_strongest(scores: HeadScores) -> None:
    """The five heads with the highest score of each kind, side by side."""
    columns = []
    for kind in kinds_of(scores):
        best = [
            f"head {block}.{head}: {score:.2f}" for block, head, score in scores.strongest(kind)
        ]
        columns.append([f"{kind.replace('_', '-')} heads", *best])
    print("Scores on random tokens said twice, from 0 to 1 (head 8.2: block 8, head 2):\n")
    for row in zip(*columns, strict=True):
        print("  " + "".join(f"{cell:<24}" for cell in row).rstrip())


def print_last_looks(attention: Tensor, tokens: list[str], layer: int) -> None:
    """The tokens that get most of the last one's attention, in each head."""
    print(f"\nWhere the last token, {tokens[-1]}, looks in block {layer} (with its position):\n")
    for head, shares in enumerate(attention[:, -1]):
        best = shares.topk(min(3, len(tokens)))
        cells = [
            f"{f'{i} {shortened(tokens[i], 11)}':<16}{share:4.0%}"
            for i, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        print(f"  {f'head {layer}.{head}':<11} ", "  ".join(cells))


# ---- lens


def show_lens(model: GPT2, tokenizer: Tokenizer, token_ids: Tensor, flags: Flags) -> None:
    """What would come next after each block, and how likely the model finds the text."""
    missing = tokenizer.missing_ids(model.config.vocab_size)
    lens = logit_lens(model, token_ids, forbidden_ids=missing)
    print(f"After {end_of(flags.text, 60)!r}\nwould come, read after each block:\n")
    for layer, ids, shares in zip(
        lens.layers, lens.token_ids[:, 0, -1].tolist(), lens.probabilities[:, 0, -1], strict=True
    ):
        labels = [shortened(label, 6) for label in token_labels(tokenizer, ids)]
        cells = zip(labels, shares.tolist(), strict=True)
        print(
            f"  {layer_of(layer):<10}",
            "".join(f"{label:<8}{share:4.0%} " for label, share in cells),
        )
    pieces = score_text(model, tokenizer, flags.text)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ  # no-color.org
    print(f"\nHow likely it finds the text:\n{surprise_legend(color)}\n")
    print(surprise_text(pieces, color))
    mean = sum(piece.logprob for piece in pieces) / token_ids.shape[1]
    print(f"({-mean:.2f} nats per token)")
    contents = {"text": flags.text, "lens": lens.summary(tokenizer)}
    contents["pieces"] = [{"text": p.text, "logprob": p.logprob} for p in pieces]
    title = f"Logit lens of {flags.name}: the likeliest next token after each block"
    write(flags, contents, lens=lambda path: plot_lens(lens, tokenizer, token_ids, path, title))


# ---- compare


def show_comparison(model: GPT2, tokenizer: Tokenizer, token_ids: Tensor, flags: Flags) -> None:
    """What is different in another model: weights, and activations on the text."""
    name = flags.comparison.other or f"{flags.name} after 10 steps"
    if flags.comparison.other is None:
        other = trained_a_little(model, tokenizer)
    elif holds_adapter(Path(flags.comparison.other)):
        other, _ = models.load(flags.model, device=model.tok_emb.weight.device)
        load_adapter(other, flags.comparison.other)
    else:
        other = GPT2.from_pretrained(flags.comparison.other, device=model.tok_emb.weight.device)
    comparison = compare_models(model, other, token_ids)
    print(f"From {flags.name} to {name}, the largest relative change first\n")
    print(comparison.table(flags.comparison.rows))
    title = f"Change by layer, {flags.name} to {name}"
    write(flags, comparison.summary(), compare=partial(plot_change, comparison, title=title))


def trained_a_little(model: GPT2, tokenizer: Tokenizer, steps: int = 10) -> GPT2:
    """A copy that has read a little of the bundled text."""
    text = sample("sample.txt")
    print(f"No --other: {steps} steps on {text.name} make one.\n")
    other = deepcopy(model).train()
    window = min(64, model.config.context_length)
    ids = tokenizer.encode(text.read_text(encoding="utf-8"))[: 2 * steps * window]
    rows = torch.tensor(ids, device=model.tok_emb.weight.device).view(-1, 2, window)
    optimizer = adamw(other, lr=1e-4)
    for token_ids in rows:  # (2, window)
        loss_sum, count = next_token_loss(other(token_ids), token_ids)
        (loss_sum / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return other.eval()


def shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "\u2026"


def write(flags: Flags, contents: Any, **pictures: Callable[[Path], object]) -> None:
    """Write the figures, and draw the pictures."""
    path = Path(flags.out) / f"{flags.what}.json"
    write_json(path, contents)
    print(f"\n{path}")
    common.draw(path.parent, **pictures)
