"""Fine-tuning a spam classifier: the published book recipe beside gpt2mini's way, in one run.

    python tests/benchmarks/classification.py                       # GPT-2 124M, random weights
    python tests/benchmarks/classification.py --plain-epochs 1      # the recipe once, times 5
    python tests/benchmarks/classification.py --model gpt2-nano     # as fast *and* as accurate?

Both start from the same weights, head included, and train the last block, the final norm and the
head in float32 on the same balanced SMS messages, split 70/10/20, 8 to a batch.

The recipe is chapter 6 of Raschka, *Build a Large Language Model (From Scratch)*: every text padded
with <|endoftext|> to the longest of the training part (257 tokens with seed 0; 120 in the book's
own split, see --pad-to), no mask, all blocks computed in every step, plain AdamW, the loss of 5 + 5
batches every 50 steps, the accuracy of 5 + 5 batches after every epoch. It runs on our model, whose
attention is the fused one; the book's own, written out, is slower.

gpt2mini's way is that of `gpt2mini classify`: what the frozen blocks compute is
computed once, and its time counts; batches of similar length, masked; the last block for the last
token only; a cosine schedule; all validation texts after every epoch.

Learning rates are each one's published defaults: the book's 5e-5 and the example's 5e-4. Below 50
million parameters the example takes four times its rate, and the recipe, which has none for such
models, is given the same. Accuracies of random weights say nothing: compare those of --model.
"""

import argparse
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gpt2mini import GPT2, GPT2Config, Tokenizer
from gpt2mini.classification.frozen import (
    LabeledBatches,
    PlainTexts,
    evaluate_classes,
    last_token_step,
    texts_to_train_on,
)
from gpt2mini.classification.labeled import LabeledTexts, balanced, read_labeled, stratified_split
from gpt2mini.data.batching import encode_texts
from gpt2mini.training import Settings, adamw, cosine, train

SHARED = Path(__file__).parents[3] / "shared" / "data"  # beside the checkout
BATCH_SIZE = 8
PLAIN_RATE = 5e-5  # the book's, for 124M
OUR_RATE = 5e-4  # of `gpt2mini classify`, for 124M
SMALL = 50_000_000  # parameters; below, the example takes four times its rate
EVALUATE_EVERY, EVALUATED_BATCHES = 50, 5  # the book's


@dataclass(frozen=True)
class Result:
    once: float  # seconds before the first epoch
    epochs: float  # seconds of all epochs
    validation_accuracy: float
    test_accuracy: float

    @property
    def seconds(self) -> float:
        return self.once + self.epochs


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    parts = stratified_split(some_texts(args), (0.7, 0.1, 0.2), args.seed)
    tokenizer = Tokenizer.from_pretrained(args.model or present(args.tokenizer, "tokenizer"))
    sizes = ", ".join(f"{len(part)} {name}" for part, name in zip(parts, PARTS, strict=True))
    print(f"{args.model or args.size}, {sizes} texts, {args.threads} threads, seed {args.seed}")

    theirs = run_recipe(args, parts, tokenizer)
    ours = run_gpt2mini(args, parts, tokenizer)
    print(f"\n{'':12}{'seconds':>10}{'once':>8}{'per epoch':>12}{'validation':>12}{'test':>8}")
    for name, result in (("the recipe", theirs), ("gpt2mini", ours)):
        print(
            f"{name:12}{result.seconds:10.1f}{result.once:8.1f}{result.epochs / args.epochs:12.1f}"
            f"{result.validation_accuracy:12.3f}{result.test_accuracy:8.3f}"
        )
    if args.plain_epochs < args.epochs:
        print(
            f"(the recipe was run for {args.plain_epochs} of {args.epochs} epochs: its seconds are "
            "multiplied accordingly, its accuracies are those after the epochs that were run)"
        )
    print(f"gpt2mini / the recipe: speed {theirs.seconds / ours.seconds:.1f} x")


PARTS = ("training", "validation", "test")


def some_texts(args: argparse.Namespace) -> LabeledTexts:
    """As many texts of both classes, at most --texts of each."""
    data = balanced(read_labeled(present(args.data, "data")), args.seed)
    labels = np.array(data.labels)
    chosen = [np.flatnonzero(labels == label)[: args.texts] for label in np.unique(labels)]
    return data.subset(np.sort(np.concatenate(chosen)).tolist())


def present(path: Path, flag: str) -> Path:
    if not path.exists():
        sys.exit(f"{path.resolve()} is not there: say where else with --{flag}")
    return path


def new_classifier(args: argparse.Namespace, n_classes: int) -> GPT2:
    """The same for both, from the seed. The last block, the final norm and the head learn."""
    torch.manual_seed(args.seed)
    if args.model:
        model = GPT2.from_pretrained(args.model, dtype=torch.float32, device="cpu")
    else:
        model = GPT2(GPT2Config.from_name(args.size))
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.out_head = nn.Linear(model.config.emb_dim, n_classes, bias=False)
    for module in (model.trf_blocks[-1], model.final_norm):
        module.requires_grad_(True)
    model(torch.zeros(BATCH_SIZE, 16, dtype=torch.long)).sum().backward()  # a warm-up
    model.zero_grad()
    return model


def is_small(model: GPT2) -> bool:
    return sum(parameter.numel() for parameter in model.parameters()) < SMALL


# ---- the recipe


def run_recipe(
    args: argparse.Namespace, parts: tuple[LabeledTexts, ...], tokenizer: Tokenizer
) -> Result:
    model = new_classifier(args, len(parts[0].class_names))
    rate = args.plain_lr or (4 * OUR_RATE if is_small(model) else PLAIN_RATE)
    began = time.perf_counter()
    training, validation, test = padded_loaders(
        parts, tokenizer, args.pad_to, torch.Generator().manual_seed(args.seed)
    )
    once = time.perf_counter() - began
    longest = training.dataset[0][0].shape[0]
    print(
        f"the recipe: epochs: {args.plain_epochs}, steps in each: {len(training)}, texts padded to "
        f"{longest} tokens, learning rate {rate:g}",
        flush=True,
    )
    spent: dict[str, float] = defaultdict(float)
    train_by_recipe(model, training, validation, args.plain_epochs, rate, spent)
    return Result(
        once,
        seconds_of_all_epochs(spent, len(training), args.plain_epochs, args.epochs),
        calc_accuracy_loader(model, validation),
        calc_accuracy_loader(model, test),
    )


def padded_loaders(
    parts: tuple[LabeledTexts, ...],
    tokenizer: Tokenizer,
    pad_to: int | None,
    generator: torch.Generator,
) -> list[DataLoader]:
    """Every text as long as the longest of the training part; longer ones are cut."""
    encoded = [[tokenizer.encode(text) for text in part.texts] for part in parts]
    longest = pad_to or max(map(len, encoded[0]))
    loaders = []
    for part, rows in zip(parts, encoded, strict=True):
        padded = [(ids + [tokenizer.eos_id] * longest)[:longest] for ids in rows]
        data = TensorDataset(torch.tensor(padded), torch.tensor(part.labels))
        learns = part is parts[0]
        loaders.append(
            DataLoader(data, BATCH_SIZE, shuffle=learns, drop_last=learns, generator=generator)
        )
    return loaders


def train_by_recipe(
    model: GPT2,
    training: DataLoader,
    validation: DataLoader,
    epochs: int,
    rate: float,
    spent: dict[str, float],
) -> None:
    """`spent` gets the seconds of steps, losses and accuracies."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    step = 0
    for epoch in range(epochs):
        model.train()
        for token_ids, labels in training:
            with timed(spent, "steps"):
                optimizer.zero_grad()
                calc_loss_batch(model, token_ids, labels).backward()
                optimizer.step()
            if step % EVALUATE_EVERY == 0:
                with timed(spent, "losses"):
                    model.eval()
                    losses = [calc_loss_loader(model, loader) for loader in (training, validation)]
                    model.train()
                print(
                    f"  step {step}: loss {losses[0]:.3f}, validation {losses[1]:.3f}", flush=True
                )
            step += 1
        with timed(spent, "accuracies"):
            found = [
                calc_accuracy_loader(model, loader, EVALUATED_BATCHES)
                for loader in (training, validation)
            ]
        print(
            f"  epoch {epoch + 1}: accuracy {found[0]:.3f}, validation {found[1]:.3f}", flush=True
        )


def calc_loss_batch(model: GPT2, token_ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(token_ids)[:, -1, :]  # (batch, classes), at the last token
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def calc_loss_loader(model: GPT2, loader: DataLoader) -> float:
    losses = [
        calc_loss_batch(model, token_ids, labels).item()
        for token_ids, labels in islice(loader, EVALUATED_BATCHES)
    ]
    return sum(losses) / len(losses)


@torch.no_grad()
def calc_accuracy_loader(model: GPT2, loader: DataLoader, n_batches: int | None = None) -> float:
    model.eval()
    correct, seen = 0, 0
    for token_ids, labels in islice(loader, n_batches):
        predicted = model(token_ids)[:, -1, :].argmax(dim=1)  # (batch)
        correct += int((predicted == labels).sum())
        seen += len(labels)
    return correct / seen


@contextmanager
def timed(spent: dict[str, float], what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    spent[what] += time.perf_counter() - began


def seconds_of_all_epochs(
    spent: dict[str, float], steps_per_epoch: int, epochs_run: int, epochs: int
) -> float:
    """What all epochs take, from those that were run. The first has a loss evaluation more."""

    def evaluations(n_epochs: int) -> int:
        return math.ceil(n_epochs * steps_per_epoch / EVALUATE_EVERY)

    in_epochs = (spent["steps"] + spent["accuracies"]) * epochs / epochs_run
    return in_epochs + spent["losses"] * evaluations(epochs) / evaluations(epochs_run)


# ---- gpt2mini's way


def run_gpt2mini(
    args: argparse.Namespace, parts: tuple[LabeledTexts, ...], tokenizer: Tokenizer
) -> Result:
    model = new_classifier(args, len(parts[0].class_names))
    rate = args.lr or OUR_RATE * (4 if is_small(model) else 1)
    steps_per_epoch = math.ceil(len(parts[0]) / BATCH_SIZE)
    steps = args.epochs * steps_per_epoch
    settings = Settings(
        steps=steps,
        schedule=partial(cosine, steps=steps, warmup_steps=max(1, steps // 10)),
        precision="fp32",
        log_every=max(1, steps // 50),
        evaluate_every=steps_per_epoch,
        progress=False,
        unit="texts",
        recompute=False,
    )
    print(
        f"gpt2mini: epochs: {args.epochs}, steps in each: {steps_per_epoch}, "
        f"learning rate {rate:g}",
        flush=True,
    )
    began = time.perf_counter()
    encoded = [
        encode_texts(part.texts, tokenizer, model.config.context_length) for part in parts[:2]
    ]
    training, validation = (
        texts_to_train_on(model, rows, part.labels, precision="fp32")
        for rows, part in zip(encoded, parts[:2], strict=True)
    )
    once = time.perf_counter() - began

    def evaluate() -> dict[str, float]:
        loss, accuracy = evaluate_classes(model, validation, precision="fp32")
        print(f"  loss on validation {loss:.3f}, accuracy {accuracy:.3f}", flush=True)
        return {"validation_loss": loss, "validation_accuracy": accuracy}

    logs = train(
        model,
        LabeledBatches(training, BATCH_SIZE, args.seed),
        [adamw(model, lr=rate)],
        settings,
        loss_function=last_token_step,
        evaluate=evaluate,
    )
    seconds = time.perf_counter() - began
    test = encode_texts(parts[2].texts, tokenizer, model.config.context_length)
    return Result(
        once,
        seconds - once,
        logs[-1]["validation_accuracy"],
        evaluate_classes(model, PlainTexts(test, parts[2].labels), precision="fp32")[1],
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="gpt2", help="gpt2, gpt2-medium, ... (default gpt2)")
    parser.add_argument("--model", help="folder or name of a trained model, instead of --size")
    parser.add_argument(
        "--data",
        type=Path,
        default=SHARED / "sms-spam" / "SMSSpamCollection",
        help="label<TAB>text lines, .csv or .jsonl (default: looked for beside the checkout)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=SHARED / "gpt2-bpe",
        help="folder of GPT-2's own tokenizer, for --size (default: looked for likewise)",
    )
    parser.add_argument("--epochs", type=int, default=5, help="default 5")
    parser.add_argument(
        "--plain-epochs", type=int, help="of the recipe, to be multiplied (default: all)"
    )
    parser.add_argument("--pad-to", type=int, help="tokens; the recipe's texts (default: longest)")
    parser.add_argument("--texts", type=int, help="at most so many of each class (default: all)")
    parser.add_argument("--lr", type=float, help="gpt2mini's peak rate (default: see above)")
    parser.add_argument("--plain-lr", type=float, help="the recipe's rate (default: see above)")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    args = parser.parse_args()
    args.plain_epochs = args.plain_epochs or args.epochs
    if not 1 <= args.plain_epochs <= args.epochs:
        parser.error("--plain-epochs must lie in 1 to --epochs")
    if args.texts is not None and args.texts < BATCH_SIZE:
        parser.error(
            f"--texts must be at least {BATCH_SIZE}: the recipe leaves out partial batches"
        )
    return args


if __name__ == "__main__":
    main()
