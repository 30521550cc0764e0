"""What each process has to hold when a model is spread over several: on paper, and measured.

    python tests/benchmarks/sharded_memory.py

On paper: weights, gradients and AdamW's two averages, four bytes a number each, divided by the
number of processes; and what is whole for a moment: the embeddings, which the first and the last
layer need, and two blocks, one computing and one being gathered, with their gradients.
Activations come on top: with --activation-checkpointing, one input for each block and token. The
same sums are then checked on a small model in 1 and 2 processes of this machine, by the sizes of
the tensors that each holds after a step, on the processor, through gloo.
"""

import argparse
import json
import subprocess
import sys

import torch

from gpt2mini import GPT2, GPT2Config
from gpt2mini.data.text import Batch
from gpt2mini.training import Settings, adamw, train
from gpt2mini.training.distributed import get_rank, process_group, shard

BYTES = 4
SMALL = GPT2Config(vocab_size=8192, context_length=512, emb_dim=256, n_heads=4, n_layers=12)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="gpt2-xl", help="on paper (default gpt2-xl)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().worker:
        with process_group():
            measure()
        return
    name = parser.parse_args().size
    config = GPT2Config.from_name(name)
    print(f"{name}, GB in each process, before activations\n")
    print("processes   weights   gradients   AdamW   whole for a moment   together")
    for processes in (1, 2, 8):
        kept, passing = on_paper(config, processes)
        each = kept / 4 / 1e9
        print(
            f"{processes:9}   {each:7.2f}   {each:9.2f}   {2 * each:5.2f}   "
            f"{passing / 1e9:18.2f}   {(kept + passing) / 1e9:8.2f}"
        )
    row = 1024 * config.emb_dim * (config.n_layers + 1) * BYTES
    print(f"activations with --activation-checkpointing: {row / 1e9:.2f} GB per 1,024 tokens")
    print("\nmeasured: a model of 12 blocks of 256, after a step of AdamW")
    for processes in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launch, __file__, "--worker"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        held = json.loads(done.stdout)
        paper = on_paper(SMALL, processes)[0]
        print(
            f"{processes} processes: {held / 1e6:.2f} MB held by the first, {paper / 1e6:.2f} on "
            f"paper: {held / paper:.3f} x"
        )


def on_paper(config: GPT2Config, processes: int) -> tuple[float, float]:
    """Bytes that a process keeps, and bytes that it has besides while a block computes."""
    with torch.device("meta"):
        model = GPT2(config)
    block = sum(p.numel() for p in model.trf_blocks[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    others = total - config.n_layers * block
    kept = 4 * total * BYTES / processes
    passing = 0 if processes == 1 else 2 * (others + 2 * block) * BYTES
    return kept, passing


def measure() -> None:
    torch.manual_seed(0)
    model = GPT2(SMALL)
    shard(model, "fp32")
    optimizer = adamw(model, lr=1e-4)
    ids = torch.randint(8192, (1, 64))
    settings = Settings(steps=1, schedule=lambda step: 1.0, precision="fp32", progress=False)
    train(model, [Batch(ids, ids)] * 2, [optimizer], settings)
    tensors = [p for p in model.parameters()]
    tensors += [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    held = sum(t.to_local().numel() * t.element_size() for t in tensors)  # type: ignore[attr-defined]
    gradients = sum(p.to_local().numel() * 4 for p in model.parameters())  # type: ignore[attr-defined]
    if get_rank() == 0:
        print(json.dumps(held + gradients))


if __name__ == "__main__":
    main()
