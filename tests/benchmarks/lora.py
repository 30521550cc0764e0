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
import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from measuring import (
    LossOf,
    add_step_flags,
    machine,
    measure_in_own_process,
    seconds_per_step,
    start_measuring_memory,
    transformers_model,
)
from torch import nn
from training_step import prepared

from gpt2mini import GPT2, GPT2Config

Results = dict[tuple[str, str], dict[str, float]]  # (library, precision) -> figures

LIBRARIES = ("peft", "gpt2mini")
TARGETS = {
    "attention": {"peft": ["c_attn"], "gpt2mini": ["query", "key", "value"]},
    "all": {
        "peft": ["c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        "gpt2mini": ["query", "key", "value", "attn_out", "mlp_in", "mlp_out"],
    },
}


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    if args.worker:
        print(json.dumps(measure(args)))
    else:
        compare(sys.argv[1:])


def compare(arguments: Sequence[str]) -> Results:
    """Measure and print what the flags ask for."""
    args = parse_arguments(arguments)
    print(
        f"{args.size}, rank {args.rank} on {args.targets}, {args.batch_size} x {args.tokens} "
        f"tokens, {machine(args)}"
    )
    print(f"{'':16}{'adapters':>12}{'tokens/s':>10}{'GB beyond weights':>20}", flush=True)
    results = {}
    for precision in args.precisions:
        for library in LIBRARIES:
            worker = f"{library}:{precision}"
            found = measure_in_own_process(__file__, arguments, worker, "-W", "ignore")
            results[library, precision] = found
            print(
                f"{library + ' ' + precision:16}{found['adapters']:12,}{found['speed']:10.1f}"
                f"{found['peak'] / 1e9:20.3f}",
                flush=True,
            )
    print_ratios(results, args.precisions)
    return results


def print_ratios(results: Results, precisions: list[str]) -> None:
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


def measure(args: argparse.Namespace) -> dict[str, float]:
    library, precision = args.worker.split(":")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = GPT2Config.from_name(args.size)
    config = dataclasses.replace(config, n_layers=args.layers or config.n_layers)
    build = {"peft": theirs, "gpt2mini": ours}[library]
    model, loss_of = build(config, args.rank, TARGETS[args.targets][library])
    model.to(args.device)
    token_ids = torch.randint(config.vocab_size, (args.batch_size, args.tokens)).to(args.device)
    peak_beyond_weights = start_measuring_memory(args.device)
    measured = token_ids, token_ids[:1, :8], args.steps, precision
    with prepared(model, precision) if library == "gpt2mini" else nullcontext():
        seconds = seconds_per_step(model, loss_of, *measured)
    return {
        "speed": token_ids.numel() / seconds,
        "peak": peak_beyond_weights(),
        "adapters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def ours(config: GPT2Config, rank: int, targets: list[str]) -> tuple[nn.Module, LossOf]:
    from gpt2mini.data.text import Batch
    from gpt2mini.lora import add_lora
    from gpt2mini.training import next_token_step

    model = GPT2(config)
    add_lora(model, rank=rank, alpha=2 * rank, targets=targets)
    return model, lambda token_ids: next_token_step(model, Batch(token_ids, token_ids))


def theirs(config: GPT2Config, rank: int, targets: list[str]) -> tuple[nn.Module, LossOf]:
    import peft

    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=targets,
        fan_in_fan_out=True,  # GPT-2's layers are Conv1D
    )
    model = peft.get_peft_model(transformers_model(config), settings)
    return model, lambda token_ids: (model(input_ids=token_ids, labels=token_ids).loss, 1)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="gpt2", help="gpt2, gpt2-medium, ... (default gpt2)")
    parser.add_argument("--layers", type=int, help="blocks (default: those of the size)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", choices=list(TARGETS), default="attention")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    add_step_flags(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
