"""Perplexity of WikiText-2: gpt2mini beside the usual sliding-window recipe of transformers.

    python tests/benchmarks/perplexity.py wikitext-2.test.txt              # the whole file: hours
    python tests/benchmarks/perplexity.py wikitext-2.test.txt --limit 16

The recipe (huggingface.co/docs/transformers/perplexity) takes one window at a time, sets the labels
that an earlier window has scored to -100 and computes all logits. Both read the same ids with the
same random weights of GPT-2's shape, in one process, a small window first to warm up. `--limit`
stops both after as many windows. Needs transformers.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gpt2mini import GPT2, GPT2Config
from gpt2mini.data.text import sliding_windows
from gpt2mini.device import autocast
from gpt2mini.evaluation.windows import states_and_targets, window_batches
from gpt2mini.losses.chunked import summed_cross_entropy
from gpt2mini.modes import evaluating


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ids = read_ids(args)
    model = GPT2(GPT2Config.from_name(args.size)).to(args.device).eval()
    theirs = as_transformers(model)
    n = -(-max(len(ids) - args.context_length, 0) // args.stride) + 1
    print(
        f"{args.size}, {len(ids):,} tokens in {n} windows of {args.context_length}, stride "
        f"{args.stride}; {args.threads} threads on {args.device}, {args.precision}"
    )
    for warm_up in (ids[:64], ids):
        began = time.perf_counter()
        loss_theirs = recipe(theirs, warm_up, args)
        seconds_theirs = time.perf_counter() - began
        began = time.perf_counter()
        loss_ours = loss_in_windows(model, warm_up, args)
        seconds_ours = time.perf_counter() - began
    for name, loss, seconds in (
        ("transformers", loss_theirs, seconds_theirs),
        ("gpt2mini", loss_ours, seconds_ours),
    ):
        speed = len(ids) / seconds
        print(f"{name:14}{seconds:9.2f} s{speed:10.1f} tokens/s   perplexity {math.exp(loss):.3f}")
    print(f"gpt2mini / transformers: speed {seconds_theirs / seconds_ours:.2f} x")


def loss_in_windows(model: GPT2, ids: torch.Tensor, args: argparse.Namespace) -> float:
    """What `gpt2mini.evaluation.perplexity` does, from token ids on."""
    rows = sliding_windows([ids], min(args.context_length, len(ids)), args.stride)
    nats, device = 0.0, model.tok_emb.weight.device
    with evaluating(model), autocast(device, args.precision):
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


def as_transformers(model: GPT2):
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded: Any = transformers.GPT2LMHeadModel.from_pretrained(folder)
    return loaded.to(model.tok_emb.weight.device).eval()


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
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "auto"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
