"""Peak memory and speed of one training step: gpt2mini beside transformers, in one run.

    python tests/benchmarks/training_step.py                       # GPT-2 124M, 4 x 1024 tokens
    python tests/benchmarks/training_step.py --tokens 256 --precisions fp32

Both train a GPT-2 of the same size from random weights, without dropout, with fused AdamW on the
same ids. Each measurement has a process of its own, so that its peak memory is its own, and a first
small step that makes the optimizer's state, so that the measured steps hold everything at once. The
median step counts. Needs transformers.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext

import torch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="gpt2", help="gpt2, gpt2-medium, ... (default gpt2)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"]
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args)))
        return
    print(f"{args.size}, {args.batch_size} x {args.tokens} tokens, {args.threads} threads")
    print(f"{'':24}{'tokens/s':>10}{'peak GB':>10}")
    results = {}
    for precision in args.precisions:
        for library in ("transformers", "gpt2mini"):
            command = [
                sys.executable,
                __file__,
                *sys.argv[1:],
                "--worker",
                f"{library}:{precision}",
            ]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            results[library, precision] = found
            print(
                f"{library + ' ' + precision:24}{found['speed']:10.1f}{found['peak']:10.2f}",
                flush=True,
            )
    for precision in args.precisions:
        ours, theirs = results["gpt2mini", precision], results["transformers", precision]
        print(
            f"{precision}: gpt2mini / transformers: speed {ours['speed'] / theirs['speed']:.2f} x, "
            f"peak memory {ours['peak'] / theirs['peak']:.2f} x"
        )
    if len(args.precisions) > 1:
        best = max(results["gpt2mini", p]["speed"] for p in args.precisions)
        ratio = best / results["transformers", "bf16"]["speed"]
        print(f"gpt2mini at its best / transformers with bf16 autocast: speed {ratio:.2f} x")


def measure(args: argparse.Namespace) -> dict[str, float]:
    library, precision = args.worker.split(":")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, loss_of = ours(args.size) if library == "gpt2mini" else theirs(args.size)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()

    def step(token_ids: torch.Tensor) -> float:
        began = time.perf_counter()
        with autocast:
            loss = loss_of(token_ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    step(torch.randint(50257, (1, 8)))
    token_ids = torch.randint(50257, (args.batch_size, args.tokens))
    seconds = statistics.median(step(token_ids) for _ in range(args.steps))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    return {"speed": token_ids.numel() / seconds, "peak": peak / 1e9}


def ours(size: str):
    from gpt2mini import GPT2, GPT2Config
    from gpt2mini.losses import chunked_next_token_loss
    from gpt2mini.training import recompute_activations

    model = GPT2(GPT2Config.from_name(size))

    def loss_of(token_ids: torch.Tensor) -> torch.Tensor:
        with recompute_activations(model):
            hidden = model.hidden_states(token_ids)
        loss_sum, count = chunked_next_token_loss(hidden, model.out_head, token_ids)
        return loss_sum / count

    return model, loss_of


def theirs(size: str):
    import transformers

    from gpt2mini import GPT2Config

    config = GPT2Config.from_name(size)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=config.emb_dim,
            n_head=config.n_heads,
            n_layer=config.n_layers,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            use_cache=False,
        )
    )
    return model, lambda token_ids: model(token_ids, labels=token_ids).loss


if __name__ == "__main__":
    main()
