"""Look inside a model: what flows through it, who looks at whom, what it thinks on its way.

python examples/inspect_model.py trace --text "The capital of France is"
python examples/inspect_model.py attention --layer 5
python examples/inspect_model.py lens --model gpt2
python examples/inspect_model.py compare --model gpt2 --other runs/finetune_text/best

Prints what it finds and writes it to --out: pictures (PNG) and figures (JSON). Without --other,
`compare` shows what 10 steps of training on a bundled text do to the model.
"""

import argparse
import os
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from flags import SAMPLE_TEXT, common_flags, run
from torch import Tensor

from gpt2mini import GPT2, Tokenizer
from gpt2mini.checkpoints import holds_adapter
from gpt2mini.device import pick_device
from gpt2mini.files import writable_folder, write_json
from gpt2mini.inspection import (
    Trace,
    compare_models,
    head_scores,
    logit_lens,
    plot_attention,
    plot_change,
    plot_head_scores,
    plot_lens,
    score_text,
    surprise_legend,
    surprise_text,
    token_labels,
    trace,
)
from gpt2mini.lora import load_adapter
from gpt2mini.losses import next_token_loss
from gpt2mini.training import adamw


def main() -> None:
    args = parse_arguments()
    if not args.text:
        raise ValueError("the text is empty: there is nothing to look at")
    if args.rows < 1:
        raise ValueError(f"--rows must be at least 1, not {args.rows}")
    args.out = writable_folder(args.out)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    tokenizer = Tokenizer.from_pretrained(args.model)
    model = GPT2.from_pretrained(args.model, device=device)
    layers = model.config.n_layers
    if args.layer is not None and not 0 <= args.layer < layers:
        raise ValueError(f"--layer must be from 0 to {layers - 1}, not {args.layer}")
    token_ids = torch.tensor([tokenizer.encode(args.text)], device=device)
    SUBCOMMANDS[args.what](model, tokenizer, token_ids, args)


# ---- trace


def show_trace(model: GPT2, tokenizer: Tokenizer, token_ids: Tensor, args: Any) -> None:
    """Lengths of what every layer adds to the stream, and what comes out at the end."""
    found = trace(model, token_ids)
    rows = stream_lengths(found, model.config.n_layers)
    print("Length of a token's vector (median), layer by layer\n")
    print(f"{'':<10}{'attention adds':>16}{'MLP adds':>12}{'stream':>12}")
    print(f"{'embedding':<10}{'':>28}{length(found['embedding']):>12.2f}")
    for row in rows if args.layer is None else [rows[args.layer]]:
        lengths = f"{row['attn_out']:>16.2f}{row['mlp_out']:>12.2f}{row['stream']:>12.2f}"
        print(f"{'block ' + str(row['layer']):<10}{lengths}")
    following: dict[str, float] = {}
    if found["logits"].shape[2] == model.config.vocab_size:  # a classifier names no next token
        best = found["logits"][0, -1].float().softmax(dim=0).topk(5)
        labels = token_labels(tokenizer, best.indices.tolist())
        following = dict(zip(labels, best.values.tolist(), strict=True))
        print(f"\nAfter {args.text!r}: ", end="")
        print("  ".join(f"{token} {probability:.1%}" for token, probability in following.items()))
    print(f"\nNames in the trace, {len(found)} in all:")
    for name in (name for name in found if not name.startswith("blocks.") or ".0." in name):
        print(f"  {name:<20} {tuple(found[name].shape)}")
    shapes = {name: list(found[name].shape) for name in found}
    contents = {"text": args.text, "lengths": rows, "next_token": following, "shapes": shapes}
    finish(args.out / "trace.json", contents)


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


def show_attention(model: GPT2, tokenizer: Tokenizer, token_ids: Tensor, args: Any) -> None:
    """The heads that look one token back, the heads that continue patterns, and one layer's map."""
    scores = head_scores(model, min(32, model.config.context_length // 2), seed=args.seed)
    print("On random tokens said twice (1 would be always):")
    for kind in ("previous_token", "induction"):
        best = [f"{layer}.{head} ({score:.2f})" for layer, head, score in scores.strongest(kind)]
        print(f"  {kind.replace('_', '-') + ' heads':<22} {', '.join(best)}")
    layer = scores.strongest("induction", 1)[0][0] if args.layer is None else args.layer
    name = f"blocks.{layer}.attention"
    attention = trace(model, token_ids, names=[name])[name][0]  # (heads, tokens, tokens)
    tokens = token_labels(tokenizer, token_ids[0].tolist())
    print_last_looks(attention, tokens, layer)
    contents = {"text": args.text, "tokens": tokens, "layer": layer}
    contents |= {"attention": attention.tolist(), "induction": scores.induction.tolist()}
    contents["previous_token"] = scores.previous_token.tolist()
    title = f"Attention of {args.model}, layer {layer}"
    of_heads = f"Heads of {args.model} on repeated random tokens"
    pictures: dict[str, Callable[[Path], None]] = {
        "attention.png": lambda path: plot_attention(attention, tokens, path, title),
        "heads.png": lambda path: plot_head_scores(scores, path, of_heads),
    }
    finish(args.out / "attention.json", contents, pictures)


def print_last_looks(attention: Tensor, tokens: list[str], layer: int) -> None:
    print(f"\nWhere the last token, {tokens[-1]}, looks in layer {layer}:")
    for head, shares in enumerate(attention[:, -1]):
        best = shares.topk(min(3, len(tokens)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        print(f"  head {head:<3}", "   ".join(f"{tokens[i]} (token {i}) {p:.0%}" for i, p in pairs))


# ---- lens


def show_lens(model: GPT2, tokenizer: Tokenizer, token_ids: Tensor, args: Any) -> None:
    """What each layer would say next, and how the model finds the text."""
    lens = logit_lens(model, token_ids)
    print(f"What would come after {args.text!r}, read after each layer:\n")
    for layer, ids, shares in zip(
        lens.layers, lens.token_ids[:, 0, -1].tolist(), lens.probabilities[:, 0, -1], strict=True
    ):
        best = zip(token_labels(tokenizer, ids), shares.tolist(), strict=True)
        print(f"  {layer:<18}", "  ".join(f"{token} {share:.0%}" for token, share in best))
    pieces = score_text(model, tokenizer, args.text)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ  # no-color.org
    print(f"\nHow likely it finds the text ({surprise_legend(color)}):")
    print(surprise_text(pieces, color))
    mean = sum(piece.logprob for piece in pieces) / token_ids.shape[1]
    print(f"({-mean:.2f} nats per token)")
    contents = {"text": args.text, "lens": lens.summary(tokenizer)}
    contents["pieces"] = [{"text": p.text, "logprob": p.logprob} for p in pieces]
    title = f"Logit lens of {args.model}: the likeliest next token after each layer"
    pictures = {"lens.png": lambda path: plot_lens(lens, tokenizer, token_ids, path, title)}
    finish(args.out / "lens.json", contents, pictures)


# ---- compare


def show_comparison(model: GPT2, tokenizer: Tokenizer, token_ids: Tensor, args: Any) -> None:
    """What is different in another model: weights, and activations on the text."""
    name = args.other or f"{args.model} after 10 steps"
    if args.other is None:
        other = trained_a_little(model, tokenizer)
    elif holds_adapter(Path(args.other)):
        other = deepcopy(model)
        load_adapter(other, args.other)
    else:
        other = GPT2.from_pretrained(args.other, device=model.tok_emb.weight.device)
    comparison = compare_models(model, other, token_ids)
    print(f"From {args.model} to {name}, the largest relative change first\n")
    print(comparison.table(args.rows))
    title = f"Change by layer, {args.model} to {name}"
    pictures = {"compare.png": lambda path: plot_change(comparison, path, title)}
    finish(args.out / "compare.json", comparison.summary(), pictures)


def trained_a_little(model: GPT2, tokenizer: Tokenizer, steps: int = 10) -> GPT2:
    """A copy that has read a little of the bundled text."""
    print(f"No --other: {steps} steps on {SAMPLE_TEXT.name} make one.\n")
    other = deepcopy(model).train()
    window = min(64, model.config.context_length)
    ids = tokenizer.encode(SAMPLE_TEXT.read_text(encoding="utf-8"))[: 2 * steps * window]
    rows = torch.tensor(ids, device=model.tok_emb.weight.device).view(-1, 2, window)
    optimizer = adamw(other, lr=1e-4)
    for token_ids in rows:  # (2, window)
        loss_sum, count = next_token_loss(other(token_ids), token_ids)
        (loss_sum / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return other.eval()


# ---- all of them


def finish(
    path: Path, contents: Any, pictures: dict[str, Callable[[Path], None]] | None = None
) -> None:
    """Write the figures, draw the pictures if matplotlib is there, and say where they are."""
    write_json(path, contents)
    print(f"\n{path}")
    for name, draw in (pictures or {}).items():
        try:
            draw(path.parent / name)
        except ImportError as error:
            print(f"(no {name}: {error})")
        else:
            print(path.parent / name)


SUBCOMMANDS = {
    "trace": show_trace,
    "compare": show_comparison,
    "attention": show_attention,
    "lens": show_lens,
}


def parse_arguments() -> argparse.Namespace:
    parser = common_flags(__doc__, out="runs/inspect_model", dtype=False)
    parser.add_argument("what", choices=SUBCOMMANDS, help="what to look at")
    parser.add_argument("--model", default="gpt2-nano", help="folder or name (default gpt2-nano)")
    parser.add_argument("--other", help="compare: a model, folder or name, or an adapter's folder")
    parser.add_argument(
        "--text",
        default="The old keeper lit the lamp. Then the old keeper",
        help="what the model reads",
    )
    parser.add_argument(
        "--layer", type=int, help="trace, attention: one layer, from 0 (default: all, the telling)"
    )
    parser.add_argument("--rows", type=int, default=8, help="compare: rows per table (default 8)")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
