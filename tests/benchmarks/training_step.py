"""Peak memory and speed of one training step: gpt2mini beside transformers and nanoGPT, in one run.

    python tests/benchmarks/training_step.py                       # GPT-2 124M, 4 x 1024 tokens
    python tests/benchmarks/training_step.py --tokens 256 --precisions fp32
    python tests/benchmarks/training_step.py --libraries transformers-compiled gpt2mini-compiled
    python tests/benchmarks/training_step.py --libraries transformers gpt2mini gpt2mini-recomputed
    python tests/benchmarks/training_step.py --nanogpt FOLDER --batch-size 2 --tokens 512
    python tests/benchmarks/training_step.py --device cuda          # its memory, and its speed

All train a GPT-2 of the same size from random weights, without dropout, with fused AdamW on the
same ids. "-compiled": under torch.compile, which needs a C++ compiler: the whole of a peer's model,
the blocks of ours, as `Settings(compile=True)` does. "-recomputed": of each block only the input is
kept for backward, `Settings(activation_checkpointing=True)`; plain gpt2mini computes norms and
activation functions again, as `Settings` does unless told otherwise. nanoGPT is your own copy of
github.com/karpathy/nanoGPT: --nanogpt names the folder of its `model.py`, and adds its rows, plain
and compiled. Each measurement has
a process of its own, so that its peak memory is its own, and a first step (small, but for what is
compiled for one shape) that makes the optimizer's state, so that the measured steps hold everything
at once. The median step counts. Needs transformers.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, redirect_stdout
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path
from types import ModuleType

import torch
from measuring import (
    LossOf,
    add_step_flags,
    machine,
    measure_in_own_process,
    peak_memory,
    seconds_per_step,
    transformers_model,
)
from torch import nn

from gpt2mini import GPT2, GPT2Config

FAST = ("transformers", "transformers-compiled", "gpt2mini", "gpt2mini-compiled")
NANOGPT = ("nanogpt", "nanogpt-compiled")
LIBRARIES = (*FAST, "gpt2mini-recomputed", *NANOGPT)
Results = dict[tuple[str, str], dict[str, float]]  # (library, precision) -> figures


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    if args.worker:
        print(json.dumps(measure(args)))
    else:
        compare(sys.argv[1:])


def compare(arguments: Sequence[str]) -> Results:
    """Measure and print what the flags ask for."""
    args = parse_arguments(arguments)
    print(f"{args.size}, {args.batch_size} x {args.tokens} tokens, {machine(args)}")
    print(f"{'':24}{'tokens/s':>10}{'peak GB':>10}", flush=True)
    results = {}
    for precision in args.precisions:
        for library in args.libraries:
            found = measure_in_own_process(__file__, arguments, f"{library}:{precision}")
            results[library, precision] = found
            print(
                f"{library + ' ' + precision:24}{found['speed']:10.1f}{found['peak'] / 1e9:10.2f}",
                flush=True,
            )
    print_ratios(results)
    return results


def print_ratios(results: Results) -> None:
    ours = {key: found for key, found in results.items() if key[0].startswith("gpt2mini")}
    theirs = {key: found for key, found in results.items() if key not in ours}
    for ((our_name, precision), our), ((name, other), their) in product(
        ours.items(), theirs.items()
    ):
        if precision == other:
            print(
                f"{precision}: {our_name} / {name}: speed {our['speed'] / their['speed']:.2f} x, "
                f"peak memory {our['peak'] / their['peak']:.2f} x"
            )
    best = max((found["speed"] for found in ours.values()), default=0)
    if best and ("transformers", "bf16") in results:
        ratio = best / results["transformers", "bf16"]["speed"]
        print(f"gpt2mini at its best / transformers with bf16 autocast: speed {ratio:.2f} x")


def measure(args: argparse.Namespace) -> dict[str, float]:
    library, precision = args.worker.split(":")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = GPT2Config.from_name(args.size)
    config = dataclasses.replace(config, n_layers=args.layers or config.n_layers)
    compiled, recomputed = library.endswith("-compiled"), library.endswith("-recomputed")
    token_ids = torch.randint(config.vocab_size, (args.batch_size, args.tokens)).to(args.device)
    warm_up = token_ids if compiled else token_ids[:1, :8]
    measured = args.steps, precision
    if not library.startswith("gpt2mini"):
        make = nanogpt if library in NANOGPT else theirs
        model, loss_of = make(config, compiled, args)
        seconds = seconds_per_step(model.to(args.device), loss_of, token_ids, warm_up, *measured)
    else:
        model, loss_of = ours(config)
        with prepared(model.to(args.device), precision, compiled, recomputed):
            seconds = seconds_per_step(model, loss_of, token_ids, warm_up, *measured)
    return {"speed": token_ids.numel() / seconds, "peak": peak_memory(args.device)}


def prepared(
    model: nn.Module, precision: str, compiled: bool = False, recomputed: bool = False
) -> AbstractContextManager[None]:
    """What `train` does to a model on such settings."""
    from gpt2mini.training import Settings, loop

    settings = Settings(
        steps=1,
        schedule=lambda step: 1.0,
        precision=precision,
        compile=compiled,
        activation_checkpointing=recomputed,
    )
    return loop.prepared(model, settings)


def ours(config: GPT2Config) -> tuple[nn.Module, LossOf]:
    from gpt2mini.data.text import Batch
    from gpt2mini.training import next_token_step

    model = GPT2(config)
    return model, lambda token_ids: next_token_step(model, Batch(token_ids, token_ids))


def theirs(
    config: GPT2Config, compiled: bool, args: argparse.Namespace
) -> tuple[nn.Module, LossOf]:
    model = transformers_model(config)
    forward = torch.compile(model) if compiled else model
    return model, lambda token_ids: (forward(token_ids, labels=token_ids).loss, 1)


def nanogpt(
    config: GPT2Config, compiled: bool, args: argparse.Namespace
) -> tuple[nn.Module, LossOf]:
    """The model as nanoGPT's `train.py` trains it; its targets are shifted by the caller."""
    module = module_of(args.nanogpt)
    with redirect_stdout(sys.stderr):  # it prints its size
        model = module.GPT(
            module.GPTConfig(
                block_size=config.context_length,
                vocab_size=config.vocab_size,
                n_layer=config.n_layers,
                n_head=config.n_heads,
                n_embd=config.emb_dim,
                dropout=0.0,
                bias=True,
            )
        )
    forward = torch.compile(model) if compiled else model
    return model, lambda token_ids: (forward(token_ids, token_ids.roll(-1, dims=1))[1], 1)


def module_of(folder: Path) -> ModuleType:
    """nanoGPT's `model.py`, which is in no package."""
    spec = spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where `dataclass` looks for it
    spec.loader.exec_module(module)
    return module


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="gpt2", help="gpt2, gpt2-medium, ... (default gpt2)")
    parser.add_argument("--layers", type=int, help="blocks (default: those of the size)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument(
        "--libraries", nargs="+", default=["transformers", "gpt2mini"], choices=LIBRARIES
    )
    parser.add_argument("--nanogpt", type=Path, help="folder of nanoGPT's model.py: adds its rows")
    add_step_flags(parser)
    args = parser.parse_args(arguments)
    if args.nanogpt and not (args.nanogpt / "model.py").is_file():
        parser.error(f"--nanogpt {args.nanogpt}: no model.py there")
    if args.nanogpt and not set(args.libraries) & set(NANOGPT):
        args.libraries = [*args.libraries, *NANOGPT, "gpt2mini-compiled"]
    elif not args.nanogpt and set(args.libraries) & set(NANOGPT):
        parser.error("nanogpt needs --nanogpt FOLDER, your copy of github.com/karpathy/nanoGPT")
    return args


if __name__ == "__main__":
    main()
