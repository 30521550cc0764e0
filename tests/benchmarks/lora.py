"""Speed and memory of one LoRA training step: gpt2mini beside peft on transformers, in one run.

    python tests/benchmarks/lora.py                        # GPT-2 124M, 4 x 512 tokens, rank 8
    python tests/benchmarks/lora.py --targets all --precisions fp32
    python tests/benchmarks/lora.py --layers 1 --batch-size 1 --tokens 64 --steps 1    # a quick try

Both give a GPT-2 of the same size, from random weights and without dropout, adapters of the same
rank on the same layers, and train them with fused AdamW on the same ids; bf16 is autocast. peft's
`c_attn` is one layer where ours are query, key and value, so ours has three A's beside its one.

Each measurement has a process of its own. The median step counts. Memory is the peak of the steps
beyond what the process held when the model was ready: activations, gradients and the optimizer's
state, without weights and imports. Linux gives it exactly; elsewhere it is how far the process's
peak rose, which says too little if making the model took more. Needs transformers and peft.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt2mini import GPT2, GPT2Config

LIBRARIES = ("peft", "gpt2mini")
TARGETS = {
    "attention": {"peft": ["c_attn"], "gpt2mini": ["query", "key", "value"]},
    "all": {
        "peft": ["c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        "gpt2mini": ["query", "key", "value", "attn_out", "mlp_in", "mlp_out"],
    },
}


def main() -> None:
    args = parse_arguments()
    if args.worker:
        print(json.dumps(measure(args)))
        return
    print(
        f"{args.size}, rank {args.rank} on {args.targets}, {args.batch_size} x {args.tokens} "
        f"tokens, {args.threads} threads"
    )
    print(f"{'':16}{'adapters':>12}{'tokens/s':>10}{'GB beyond weights':>20}", flush=True)
    results = {}
    for precision in args.precisions:
        for library in LIBRARIES:
            found = measure_in_own_process(f"{library}:{precision}")
            results[library, precision] = found
            print(
                f"{library + ' ' + precision:16}{found['adapters']:12,}{found['speed']:10.1f}"
                f"{found['peak'] / 1e9:20.3f}",
                flush=True,
            )
    print_ratios(results, args.precisions)


def print_ratios(results: dict[tuple[str, str], dict[str, float]], precisions: list[str]) -> None:
    for precision in precisions:
        ours, theirs = results["gpt2mini", precision], results["peft", precision]
        print(
            f"{precision}: gpt2mini / peft: speed {ours['speed'] / theirs['speed']:.2f} x, "
            f"memory beyond the weights {ours['peak'] / theirs['peak']:.2f} x"
        )
    if len(precisions) > 1:
        best = max(results["gpt2mini", p]["speed"] for p in precisions)
        ratio = best / results["peft", "bf16"]["speed"]
        print(f"gpt2mini at its best / peft with bf16 autocast: speed {ratio:.2f} x")


def measure_in_own_process(worker: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--worker", worker]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(args: argparse.Namespace) -> dict[str, float]:
    library, precision = args.worker.split(":")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = GPT2Config.from_name(args.size)
    config = dataclasses.replace(config, n_layers=args.layers or config.n_layers)
    build = {"peft": theirs, "gpt2mini": ours}[library]
    model, loss_of = build(config, args.rank, TARGETS[args.targets][library])
    model.train()
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-4, fused=True)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()

    def step(token_ids: Tensor) -> float:
        began = time.perf_counter()
        with autocast:
            loss = loss_of(token_ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    token_ids = torch.randint(config.vocab_size, (args.batch_size, args.tokens))
    peak_beyond_weights = start_measuring_memory()
    step(token_ids[:1, :8])  # makes the optimizer's state
    seconds = statistics.median(step(token_ids) for _ in range(args.steps))
    return {
        "speed": token_ids.numel() / seconds,
        "peak": peak_beyond_weights(),
        "adapters": sum(parameter.numel() for parameter in adapters),
    }


def ours(
    config: GPT2Config, rank: int, targets: list[str]
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from gpt2mini.data.text import Batch
    from gpt2mini.lora import add_lora
    from gpt2mini.training import next_token_step, recompute_activations

    model = GPT2(config)
    add_lora(model, rank=rank, alpha=2 * rank, targets=targets)

    def loss_of(token_ids: Tensor) -> Tensor:
        with recompute_activations(model):
            loss_sum, count = next_token_step(model, Batch(token_ids, token_ids))
        return loss_sum / count

    return model, loss_of


def theirs(
    config: GPT2Config, rank: int, targets: list[str]
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    base = transformers.GPT2LMHeadModel(
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
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=targets,
        fan_in_fan_out=True,  # GPT-2's layers are Conv1D
    )
    model = peft.get_peft_model(base, settings)
    return model, lambda token_ids: model(input_ids=token_ids, labels=token_ids).loss


# ---- memory


def start_measuring_memory() -> Callable[[], int]:
    """From here on: a function that gives the bytes by which memory has grown at its peak."""
    gc.collect()
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)  # else memory freed before would hide what takes its place
    with suppress(OSError):  # not Linux, or forbidden
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is held now
    before = peak_memory()
    return lambda: peak_memory() - before


def peak_memory() -> int:
    """The most bytes of memory that the process has held, since the peak began again."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024  # kilobytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="gpt2", help="gpt2, gpt2-medium, ... (default gpt2)")
    parser.add_argument("--layers", type=int, help="blocks (default: those of the size)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", choices=list(TARGETS), default="attention")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"]
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
