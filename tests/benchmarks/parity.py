"""The parity card: how far our numbers lie from those of `transformers`, on the real shapes.

    python tests/benchmarks/parity.py                        # random gpt2 and gpt2-medium
    python tests/benchmarks/parity.py --sizes gpt2-xl --dtypes bf16
    python tests/benchmarks/parity.py --folder models/gpt2   # genuine weights

Logits, the output of every block and the gradient of every parameter: the largest and the mean
absolute difference; then how often the most likely next token is the same one. One model is in
memory at a time. bfloat16 rounds to 3 digits, so the same sums in another order differ by as much;
the last column says how far `transformers` lies from its own float32 logits.
"""

import argparse
import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from gpt2mini import GPT2, GPT2Config
from gpt2mini.checkpoints.names import to_published
from gpt2mini.losses import next_token_loss
from gpt2mini.modes import mode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Numbers:
    """What one model makes of a batch."""

    logits: Tensor
    hidden: Tensor  # (blocks, batch, tokens, emb)
    gradients: dict[str, Tensor]  # under the published names


def main() -> None:
    args = parse_arguments()
    print("| model | dtype | device | logits | blocks | gradients | same token | their rounding |")
    print("|---|---|---|---|---|---|---|---|")
    for size in [args.folder] if args.folder else args.sizes:
        for device in args.devices:
            for dtype in args.dtypes:
                with tempfile.TemporaryDirectory() as temporary:
                    folder = Path(args.folder or random_folder(size, Path(temporary)))
                    print(row(size, folder, dtype, device, args.tokens), flush=True)


def random_folder(size: str, folder: Path) -> Path:
    """A random model of a published size, written by `transformers`."""
    config = GPT2Config.from_name(size)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=config.emb_dim, n_head=config.n_heads, n_layer=config.n_layers
        )
    ).save_pretrained(folder)
    gc.collect()
    return folder


def row(name: str, folder: Path, dtype: str, device: str, tokens: int) -> str:
    vocab_size = transformers.GPT2Config.from_pretrained(folder).vocab_size
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(vocab_size, (2, tokens), generator=generator).to(device)
    theirs = their_numbers(folder, DTYPES[dtype], device, token_ids)
    ours = our_numbers(folder, DTYPES[dtype], device, token_ids)
    logits = difference([ours.logits], [theirs.logits])
    hidden = difference([ours.hidden], [theirs.hidden])
    assert ours.gradients.keys() == theirs.gradients.keys()
    gradients = difference(
        [ours.gradients[n] for n in ours.gradients], [theirs.gradients[n] for n in ours.gradients]
    )
    same = (ours.logits.argmax(2) == theirs.logits.argmax(2)).double().mean().item()
    columns = [Path(name).name, dtype, device, logits, hidden, gradients, f"{same:.1%}"]
    if dtype == "fp32":
        return f"| {' | '.join(columns)} | - |"
    exact = their_numbers(folder, torch.float32, device, token_ids, gradients=False)
    return f"| {' | '.join(columns)} | {difference([theirs.logits], [exact.logits])} |"


def difference(ours: list[Tensor], theirs: list[Tensor]) -> str:
    """Largest and mean absolute difference over all tensors."""
    largest, total, count = 0.0, 0.0, 0
    for mine, yours in zip(ours, theirs, strict=True):
        gap = (mine.float() - yours.float()).abs()
        largest = max(largest, gap.max().item())
        total, count = total + gap.sum(dtype=torch.float64).item(), count + gap.numel()
    return f"{largest:.1e} / {total / count:.1e}"


def their_numbers(
    folder: Path, dtype: torch.dtype, device: str, token_ids: Tensor, gradients: bool = True
) -> Numbers:
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
    model.to(device)
    blocks, handles = record(model.transformer.h)
    logits = model(token_ids).logits
    found = {}
    if gradients:
        loss_sum, count = next_token_loss(logits, token_ids)
        (loss_sum / count).backward()
        found = {
            name.removeprefix("transformer."): p.grad
            for name, p in model.named_parameters()
            if p.grad is not None
        }
    return finish(logits, blocks, handles, found)


def our_numbers(folder: Path, dtype: torch.dtype, device: str, token_ids: Tensor) -> Numbers:
    model = GPT2.from_pretrained(folder, dtype=dtype, device=device)
    blocks, handles = record(model.trf_blocks)
    with mode(model, training=False):
        logits = model(token_ids)
        loss_sum, count = next_token_loss(logits, token_ids)
        (loss_sum / count).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return finish(logits, blocks, handles, to_published(gradients, model.config))


def record(modules) -> tuple[list[Tensor], list]:
    """The outputs of the blocks, as they come."""
    outputs: list[Tensor] = []

    def keep(module, arguments, output) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).detach())

    return outputs, [module.register_forward_hook(keep) for module in modules]


def finish(logits: Tensor, blocks: list[Tensor], handles: list, gradients: dict) -> Numbers:
    for handle in handles:
        handle.remove()
    return Numbers(logits.detach(), torch.stack(blocks), gradients)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=sizes[:2])
    parser.add_argument("--folder", help="genuine weights: a Hugging Face folder with a tied head")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--devices", nargs="+", default=devices)
    parser.add_argument("--tokens", type=int, default=64)
    return parser.parse_args()


if __name__ == "__main__":
    main()
