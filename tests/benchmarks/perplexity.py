"""Perplexity of WikiText-2: gpt2mini beside the usual sliding-window recipe of transformers.

    python tests/benchmarks/perplexity.py wikitext-2.test.txt              # the whole file: hours
    python tests/benchmarks/perplexity.py wikitext-2.test.txt --limit 16

The recipe (huggingface.co/docs/transformers/perplexity) takes one window at a time, sets the labels
that an earlier window has scored to -100 and computes all logits. Ours: the same windows in
float32; lm-eval's rolling windows, which read every token about once (another setting, whose tokens
have less context); and both in bfloat16 where the device gains from it, as `gpt2mini evaluate` does
by default. All read the same ids with the same random weights of GPT-2's shape, in one process, a
small window first to warm up. `--limit` stops after as many windows of the recipe. Needs
transformers.

In float32 the recipe's own setting cannot be twice as fast: both multiply the same matrices in the
blocks, and the recipe computes twice the logits. A line gives the arithmetic, and how many
operations a second each has done.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measuring import as_transformers

from gpt2mini import GPT2, GPT2Config
from gpt2mini.device import autocast, best_precision
from gpt2mini.evaluation.windows import states_and_targets, text_windows, window_batches
from gpt2mini.losses.chunked import summed_cross_entropy
from gpt2mini.modes import evaluating


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ids = read_ids(args)
    model = GPT2(GPT2Config.from_name(args.size)).to(args.device).eval()
    theirs = as_transformers(model, args.device)
    n = -(-max(len(ids) - args.context_length, 0) // args.stride) + 1
    print(
        f"{args.size}, {len(ids):,} tokens in {n} windows of {args.context_length}, stride "
        f"{args.stride}; {args.threads} threads on {args.device}"
    )
    settings = [(args.stride, "fp32"), (None, "fp32")]
    if best_precision(model.tok_emb.weight.device) != "fp32":
        settings += [(stride, "auto") for stride, _ in settings]
    recipe(theirs, ids[:64], args)
    seconds, loss = timed(lambda: recipe(theirs, ids, args))
    show("transformers' recipe", len(ids), seconds, loss)
    for stride, precision in settings:
        measured = partial(loss_in_windows, model, args=args, stride=stride, precision=precision)
        measured(ids[:64])
        seconds_ours, loss = timed(partial(measured, ids))
        windows = "rolling windows" if stride is None else f"stride {stride}"
        name = f"{windows}, {best_precision(model.tok_emb.weight.device, precision)}"
        show(name, len(ids), seconds_ours, loss, seconds / seconds_ours)
        if stride is not None:
            compare_operations(model.config, args, n, seconds, seconds_ours)


def timed(run: Callable[[], float]) -> tuple[float, float]:
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def show(name: str, tokens: int, seconds: float, loss: float, ratio: float | None = None) -> None:
    end = "" if ratio is None else f"   {ratio:.2f} x"
    speed = f"{seconds:9.2f} s{tokens / seconds:10.1f} tokens/s"
    print(f"{name:26}{speed}   perplexity {math.exp(loss):.3f}{end}")


def compare_operations(
    config: GPT2Config, args: argparse.Namespace, windows: int, theirs: float, ours: float
) -> None:
    """Floating-point operations of the matrix products of full windows, two for each weight."""
    emb, length = config.emb_dim, args.context_length
    blocks = config.n_layers * (24 * length * emb**2 + 2 * length**2 * emb)  # causal attention
    head = 2 * emb * config.vocab_size
    recipe, scored = blocks + length * head, blocks + args.stride * head
    print(
        f"  operations a window: {recipe / 1e9:.0f} billion and {scored / 1e9:.0f} "
        f"({recipe / scored:.2f} x); a second: {windows * recipe / theirs / 1e9:.0f} billion and "
        f"{windows * scored / ours / 1e9:.0f}"
    )


def loss_in_windows(
    model: GPT2, ids: torch.Tensor, args: argparse.Namespace, stride: int | None, precision: str
) -> float:
    """What `gpt2mini.evaluation.perplexity` does, from token ids on."""
    rows = text_windows([ids], min(args.context_length, len(ids)), stride)
    nats, device = 0.0, model.tok_emb.weight.device
    with evaluating(model), autocast(device, precision):
        for batch in window_batches(rows, args.batch_size):
            nats += float(summed_cross_entropy(*states_and_targets(model, batch.to(device))))
    return nats / sum(row.n_scored for row in rows)


def recipe(model, ids: torch.Tensor, args: argparse.Namespace) -> float:
    nats, count, previous_end = 0.0, 0, 0
    for start in range(0, len(ids), args.stride):
        end = min(start + args.context_length, len(ids))
        window = ids[None, start:end].to(args.device)
        labels = window.clone()
        labels[:, : previous_end - start] = -100
        with torch.no_grad():
            loss = model(window, labels=labels).loss
        scored = int((labels[:, 1:] != -100).sum())
        nats, count, previous_end = nats + float(loss) * scored, count + scored, end
        if end == len(ids):
            break
    return nats / count


def read_ids(args: argparse.Namespace) -> torch.Tensor:
    """As many tokens as `--limit` windows take: GPT-2's, or random ones without its vocabulary (the
    speed is the same)."""
    wanted = args.context_length + args.stride * ((args.limit or 10**9) - 1)
    if args.tokenizer is None:
        characters = len(args.file.read_text(encoding="utf-8"))
        return torch.randint(50257, (min(wanted, characters // 4),))
    from gpt2mini import Tokenizer
    from gpt2mini.evaluation.detokenizers import detokenize_wikitext

    text = detokenize_wikitext(args.file.read_text(encoding="utf-8"))
    return torch.tensor(Tokenizer.from_pretrained(args.tokenizer).encode(text)[:wanted])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="WikiText-2's test file, or any text")
    parser.add_argument("--size", default="gpt2", help="gpt2, gpt2-medium, ... (default gpt2)")
    parser.add_argument("--tokenizer", help="a folder with GPT-2's vocabulary")
    parser.add_argument("--limit", type=int, help="windows; the default is the whole file")
    parser.add_argument("--context-length", type=int, default=1024)
    parser.add_argument("--stride", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4, help="windows at once, ours")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
