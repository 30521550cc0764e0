"""Teach a model to tell classes of texts apart, and see what it gets right and wrong.

    python examples/finetune_classifier.py                          # a minute, on a bundled sample
    python examples/finetune_classifier.py --model gpt2 --data SMSSpamCollection --balance
    python examples/finetune_classifier.py --data reviews.csv --method lora --epochs 3

The data are label<TAB>text lines or records, with any number of classes. The head is replaced by
one output per class, read at the last token of each text. Writes metrics.jsonl, summary.json,
loss.png, confusion.png and the model with the lowest validation loss to --out.
"""

import argparse
import math
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flags import (
    draw_losses,
    exit_unless_rank_zero,
    is_small,
    keeping,
    parse_columns,
    positive,
    positive_number,
    run,
    run_folder,
    shard_if_asked,
    sharding_flag,
    training_flags,
    write_summary,
)
from torch import nn

from gpt2mini import GPT2, Tokenizer
from gpt2mini.checkpoints import holds_adapter
from gpt2mini.classification import predict
from gpt2mini.classification.frozen import (
    evaluate_classes,
    last_token_step,
    shuffled_batches,
    texts_to_train_on,
)
from gpt2mini.classification.labeled import LabeledTexts, balanced, read_labeled, stratified_split
from gpt2mini.data.batching import encode_texts
from gpt2mini.data.samples import sample
from gpt2mini.device import autocast, pick_device
from gpt2mini.evaluation import ClassificationReport, classification_report
from gpt2mini.inspection import plot_confusion
from gpt2mini.lora import TARGETS, add_lora, load_adapter, merge_lora, save_adapter
from gpt2mini.model import TiedHead
from gpt2mini.training import Settings, adamw, cosine, train
from gpt2mini.training.distributed import get_world_size

SAMPLE = sample("messages.tsv")
# of the 124M model; small ones take four times these rates
PEAK_RATES = {"last-blocks": 5e-4, "full": 5e-5, "lora": 5e-4}


def main() -> None:
    args = parse_arguments()
    out = run_folder(args)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)

    data = read_labeled(args.data, parse_columns(args.columns))
    if args.balance:
        data = balanced(data, args.seed)
    print(f"{len(data)} texts: {', '.join(f'{n} {name}' for name, n in data.counts().items())}")
    training, validation, test = stratified_split(data, (0.7, 0.1, 0.2), args.seed)
    tokenizer = Tokenizer.from_pretrained(args.model)
    model = GPT2.from_pretrained(args.model, device=device)
    model.out_head = nn.Linear(model.config.emb_dim, len(data.class_names), bias=False).to(device)
    choose_what_learns(model, args.method, args.train_blocks, args.rank)
    describe(model, training, validation, test, args.method)
    shard_if_asked(args, model)

    began = time.perf_counter()
    longest = min(args.longest or model.config.context_length, model.config.context_length)
    encoded = [
        texts_to_train_on(
            model, encode_texts(part.texts, tokenizer, longest, args.keep), part.labels, args.dtype
        )
        for part in (training, validation)
    ]
    some = random.Random(args.seed).sample(
        range(len(training)), min(len(training), len(validation))
    )

    def evaluate() -> dict[str, float]:
        loss, accuracy = evaluate_classes(model, encoded[1], args.dtype)
        training_loss, training_accuracy = evaluate_classes(model, encoded[0], args.dtype, some)
        return {
            "validation_loss": loss,
            "validation_accuracy": accuracy,
            "training_loss": training_loss,
            "training_accuracy": training_accuracy,
        }

    steps_per_epoch = math.ceil(len(training) / args.batch_size)
    steps = args.steps or math.ceil(args.epochs * steps_per_epoch / get_world_size())
    settings = Settings(
        steps=steps,
        schedule=partial(cosine, steps=steps, warmup_steps=max(1, steps // 10)),
        precision=args.dtype,
        log_every=max(1, steps // 50),
        evaluate_every=min(steps, steps_per_epoch),
        unit="texts",
        recompute=args.method != "last-blocks",  # one block's activations are no burden
        **keeping(args),
    )
    logs = train(
        model,
        shuffled_batches(encoded[0], args.batch_size, args.seed),
        [adamw(model, lr=args.lr or PEAK_RATES[args.method] * (4 if is_small(model) else 1))],
        settings,
        loss_function=last_token_step,
        evaluate=evaluate,
        out=out,
        save=partial(save_adapter, replace=True)
        if args.method == "lora"
        else partial(save, names=data.class_names),
        resume=args.resume,
    )
    exit_unless_rank_zero()
    seconds = time.perf_counter() - began
    print_evaluations(logs)

    model = load_best(args, out, data.class_names, device)
    tokenizer.save_pretrained(out / "best")
    with autocast(device, args.dtype):  # all as it was in training and validation
        found = predict(model, tokenizer, test.texts, data.class_names, args.keep, longest)
    number = {name: i for i, name in enumerate(data.class_names)}
    report = classification_report(
        test.labels, [number[p.class_name] for p in found], data.class_names
    )
    print(f"\n{report}\n")
    mistakes = confident_mistakes(test, found)
    print_mistakes(mistakes)
    write_summary(out, summary(args, report, logs, seconds, mistakes))
    draw(out, args, report)
    print(f"classifier: {out / 'best'}, which transformers opens as GPT2ForSequenceClassification")


def choose_what_learns(model: GPT2, method: str, n_blocks: int, rank: int) -> None:
    """The last blocks with final norm and head, or everything, or adapters with the head."""
    if method == "lora":
        add_lora(model, rank=rank, alpha=2 * rank, targets=list(TARGETS))
    elif method == "last-blocks":
        if not 0 <= n_blocks <= model.config.n_layers:
            raise ValueError(f"--train-blocks must lie in 0 to {model.config.n_layers}")
        for parameter in model.parameters():
            parameter.requires_grad = False
        for module in (*model.trf_blocks[model.config.n_layers - n_blocks :], model.final_norm):
            module.requires_grad_(True)
    model.out_head.requires_grad_(True)


def describe(
    model: GPT2, training: LabeledTexts, validation: LabeledTexts, test: LabeledTexts, how: str
) -> None:
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print(
        f"{len(training)} to learn from, {len(validation)} to validate, {len(test)} to test; "
        f"{learning:,} of {total:,} parameters learn ({how})"
    )


def save(model: GPT2, folder: Path, names: list[str]) -> None:
    model.save_pretrained(folder, class_names=names)


def load_best(args: argparse.Namespace, out: Path, names: list[str], device: torch.device) -> GPT2:
    """The model with the lowest validation loss, as it was saved; adapters are merged, once they
    have proved themselves, so that `best` is a whole classifier."""
    if not holds_adapter(out / "best"):  # or a finished run is resumed: merged already
        return GPT2.from_pretrained(out / "best", device=device)
    model = GPT2.from_pretrained(args.model, device=device)
    model.out_head = TiedHead(model.tok_emb)  # a classifier's would expect as many classes
    load_adapter(model, out / "best")
    merge_lora(model)
    save(model, out / "best", names)
    return model


def print_evaluations(logs: list[dict[str, Any]]) -> None:
    print("\n step   loss: validation   training   accuracy: validation   training")
    for row in logs:
        if "validation_loss" in row:
            print(
                f"{row['step']:5}   {row['validation_loss']:16.3f}   {row['training_loss']:8.3f}   "
                f"{row['validation_accuracy']:20.3f}   {row['training_accuracy']:8.3f}"
            )


def confident_mistakes(test: LabeledTexts, found: list) -> list[dict[str, Any]]:
    """The ten wrong answers of which the model was most certain."""
    wrong = [
        {
            "truth": test.class_names[label],
            "predicted": prediction.class_name,
            "probability": prediction.probabilities[prediction.class_name],
            "text": text,
        }
        for text, label, prediction in zip(test.texts, test.labels, found, strict=True)
        if prediction.class_name != test.class_names[label]
    ]
    return sorted(wrong, key=lambda mistake: -mistake["probability"])[:10]


def print_mistakes(mistakes: list[dict[str, Any]]) -> None:
    if not mistakes:
        print("no mistake on the test texts")
        return
    print("the most confident mistakes:")
    for mistake in mistakes:
        what = f"{mistake['predicted']} ({mistake['probability']:.2f}), truly {mistake['truth']}"
        print(f"  {what}: {mistake['text'][:70]!r}")


def summary(
    args: argparse.Namespace,
    report: ClassificationReport,
    logs: list[dict[str, Any]],
    seconds: float,
    mistakes: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "model": str(args.model),
        "data": str(args.data),
        "method": args.method,
        "seconds": round(seconds, 1),
        "validation_loss": min(r["validation_loss"] for r in logs if "validation_loss" in r),
        "test_accuracy": report.accuracy,
        "test_macro_f1": report.macro_f1,
        "majority_baseline": report.majority_baseline,
        "class_names": report.class_names,
        "confusion": report.confusion.tolist(),
        "mistakes": mistakes,
    }


def draw(out: Path, args: argparse.Namespace, report: ClassificationReport) -> None:
    draw_losses(out, f"Classifying {Path(args.data).name} ({args.method})", unit="nats per text")
    try:
        plot_confusion(report.confusion, report.class_names, out / "confusion.png")
    except ImportError:
        return  # said already
    print(f"confusion matrix: {out / 'confusion.png'}")


def parse_arguments() -> argparse.Namespace:
    parser = training_flags(__doc__, out="runs/finetune_classifier")
    sharding_flag(parser)
    parser.add_argument("--model", default="gpt2-nano", help="folder or name (default gpt2-nano)")
    parser.add_argument(
        "--data",
        default=SAMPLE,
        help=".jsonl, .json, .csv or hf:owner/name:split; any other file: label<TAB>text lines",
    )
    parser.add_argument("--columns", help="fields called otherwise: label=theirs,text=theirs")
    parser.add_argument("--balance", action="store_true", help="as many texts of every class")
    parser.add_argument("--method", choices=list(PEAK_RATES), default="last-blocks")
    parser.add_argument(
        "--train-blocks", type=int, default=1, help="blocks that learn, from the top (default 1)"
    )
    parser.add_argument("--rank", type=positive, default=8, help="of LoRA (default 8)")
    parser.add_argument("--epochs", type=positive_number, default=5.0, help="default 5")
    parser.add_argument("--steps", type=positive, help="optimizer steps; overrides --epochs")
    parser.add_argument("--batch-size", type=positive, default=8, help="texts per step (default 8)")
    parser.add_argument(
        "--lr", type=positive_number, help="peak rate (default: by method and size)"
    )
    parser.add_argument("--longest", type=positive, help="tokens per text (default: the context)")
    parser.add_argument(
        "--keep", choices=["head", "tail"], default="head", help="of a text that is longer"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
