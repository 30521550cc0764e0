"""What the benchmarks share: a process for each measurement, its memory, the peer, a timed step."""

import argparse
import ctypes
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt2mini import GPT2, GPT2Config

# (sum of the loss, number of targets) of some ids, as `train` wants it; of a peer (mean loss, 1)
LossOf = Callable[[Tensor], tuple[Tensor, Tensor | int]]

CPU = torch.device("cpu")


def measure_in_own_process(
    script: str, arguments: Sequence[str], worker: str, *python: str
) -> dict[str, Any]:
    """What the script prints as JSON when it is started with `--worker`: what a process holds and
    has warmed up is then its own. python: flags of the interpreter."""
    command = [sys.executable, *python, script, *arguments, "--worker", worker]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def add_step_flags(parser: argparse.ArgumentParser) -> None:
    """How a training step is to be measured."""
    precisions = ["fp32", "bf16"]
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each process")
    parser.add_argument("--precisions", nargs="+", default=precisions, choices=precisions)
    add_machine_flags(parser)
    parser.add_argument("--worker", help=argparse.SUPPRESS)


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu, cuda or mps")


def machine(args: argparse.Namespace) -> str:
    """On what is measured, in a few words."""
    return f"{args.threads} threads" if args.device.type == "cpu" else str(args.device)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """A GPU has only been asked for its work when `run` is over; the work is waited for."""
    wait_for(device)
    began = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - began


def wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


# ---- memory


def start_measuring_memory(device: torch.device = CPU) -> Callable[[], int]:
    """From here on: a function that gives the bytes by which memory has grown at its peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)  # else memory freed before would hide what takes its place
    with suppress(OSError):  # not Linux, or forbidden
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is held now
    before = peak_memory(device)
    return lambda: peak_memory(device) - before


def peak_memory(device: torch.device) -> int:
    """The most bytes of memory that the process has held, since the peak began again; of a CUDA
    GPU's where that computes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024  # kilobytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ---- the models


def model_of_size(size: str) -> GPT2:
    """gpt2-nano, or another size with random weights, the same each time; in eval mode."""
    if size == "gpt2-nano":
        return GPT2.from_pretrained(size)
    torch.manual_seed(0)
    return GPT2(GPT2Config.from_name(size)).eval()


def as_transformers(model: GPT2, device: torch.device | str = CPU) -> Any:
    """The peer's model with the same weights, in eval mode."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded: Any = transformers.GPT2LMHeadModel.from_pretrained(folder)
    return loaded.to(device).eval()


def transformers_model(config: GPT2Config, use_cache: bool = False) -> Any:
    """A random GPT-2 of the shape, of the peer, without dropout."""
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.emb_dim,
            n_head=config.n_heads,
            n_layer=config.n_layers,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            use_cache=use_cache,
        )
    )


# ---- training steps


def seconds_per_step(
    model: nn.Module,
    loss_of: LossOf,
    token_ids: Tensor,
    warm_up: Tensor,
    steps: int,
    precision: str,
) -> float:
    """The median training step with fused AdamW; bf16 is autocast. A step on the ids of `warm_up`
    goes first and makes the optimizer's state, so that the measured ones hold everything at
    once. The gradients of a sum are divided and clipped after backward, as `train` does."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    device = token_ids.device
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    def step(token_ids: Tensor) -> None:
        with autocast:
            loss, count = loss_of(token_ids)
        loss.backward()
        if count != 1:
            from gpt2mini.training.loop import divide_and_clip  # only where our own are measured

            divide_and_clip(trained, float(count), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()

    step(warm_up)
    return statistics.median(seconds_of(lambda: step(token_ids), device) for _ in range(steps))
