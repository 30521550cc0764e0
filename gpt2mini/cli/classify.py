"""Train a model to tell classes of texts apart, and see what it gets right and wrong.

Examples:
  gpt2mini classify                                       # a minute, on bundled messages
  gpt2mini classify --model gpt2 --data SMSSpamCollection --balance
  gpt2mini classify --data reviews.csv --columns label=stars --method lora --epochs 3

The data are label<TAB>text lines or records (.jsonl, .json, .csv, hf:owner/name:split) with label
and text, of any number of classes. The head is replaced by one output per class, read at the last
token of each text. Writes metrics.jsonl, summary.json, loss.png, confusion.png and best/, the
classifier with the lowest validation loss, to --out.
"""

import math
import random
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
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
from gpt2mini.cli.common import (
    choose_what_learns,
    draw_losses,
    exit_unless_rank_zero,
    how_many_learn,
    how_to_save,
    is_small,
    load_best,
    print_rows,
    run_folder,
    write_summary,
)
from gpt2mini.cli.data import parse_columns
from gpt2mini.cli.flags import (
    Count,
    LastBlocks,
    LoRAFlags,
    Machine,
    OptionalCount,
    OptionalPositive,
    Positive,
    RunFlags,
    Sharding,
    only_for,
)
from gpt2mini.data.batching import encode_texts
from gpt2mini.data.samples import sample
from gpt2mini.device import autocast, pick_device
from gpt2mini.evaluation import ClassificationReport, classification_report
from gpt2mini.inspection import plot_confusion
from gpt2mini.lora import merge_lora
from gpt2mini.training import adamw, train
from gpt2mini.training.distributed import get_world_size

# of the 124M model; small ones take four times these rates
PEAK_RATES = {"last-blocks": 5e-4, "full": 5e-5, "lora": 5e-4}
SHARES = (0.7, 0.1, 0.2)  # to learn from, to validate, to test


@dataclass(frozen=True)
class Flags:
    model: str = "gpt2-nano"  # a model's folder or name
    data: str = str(sample("messages.tsv"))  # records, or any other file: label<TAB>text lines
    out: str = "runs/classify"  # folder for results
    method: Literal["last-blocks", "full", "lora"] = "last-blocks"  # what learns, beside the head
    columns: str | None = None  # fields called otherwise: label=theirs,text=theirs
    balance: bool = False  # as many texts of every class
    epochs: Positive = 5.0  # times through the data
    steps: OptionalCount = None  # optimizer steps; overrides --epochs
    batch_size: Count = 8  # texts per step
    lr: OptionalPositive = None  # peak learning rate; None: by method and size
    longest: OptionalCount = None  # tokens per text; None: the context
    keep: Literal["head", "tail"] = "head"  # of a text that is longer
    blocks: LastBlocks = field(
        default_factory=LastBlocks, metadata=only_for("--method last-blocks")
    )
    lora: LoRAFlags = field(default_factory=LoRAFlags, metadata=only_for("--method lora"))
    run: RunFlags = field(default_factory=RunFlags)
    parallel: Sharding = field(default_factory=Sharding)
    machine: Machine = field(default_factory=Machine)

    @property
    def conditions(self) -> set[str]:
        return {f"--method {self.method}"}


def run(flags: Flags) -> None:
    out = run_folder(flags.out, flags.run.resume, flags.model)
    seed, precision = flags.machine.seed, flags.machine.dtype
    torch.manual_seed(seed)
    device = pick_device(flags.machine.device)
    data = read_labeled(flags.data, parse_columns(flags.columns))
    if flags.balance:
        data = balanced(data, seed)
    training, validation, test = stratified_split(data, SHARES, seed)
    tokenizer = Tokenizer.from_pretrained(flags.model)
    model = GPT2.from_pretrained(flags.model, device=device)
    model.out_head = nn.Linear(model.config.emb_dim, len(data.class_names), bias=False).to(device)
    choose_what_learns(model, flags.method, flags.blocks, flags.lora)
    model.out_head.requires_grad_(True)
    learning, total = how_many_learn(model)
    print(
        f"{len(data)} texts: {', '.join(f'{n} {name}' for name, n in data.counts().items())}\n"
        f"{len(training)} to learn from, {len(validation)} to validate, {len(test)} to test; "
        f"{learning:,} of {total:,} parameters learn ({flags.method})"
    )

    rate = flags.lr or PEAK_RATES[flags.method] * (4 if is_small(model) else 1)
    save = how_to_save(model, partial(GPT2.save_pretrained, class_names=data.class_names))
    flags.parallel.apply(model, precision)
    began = time.perf_counter()
    longest = min(flags.longest or model.config.context_length, model.config.context_length)
    to_train, to_validate = (
        texts_to_train_on(
            model, encode_texts(part.texts, tokenizer, longest, flags.keep), part.labels, precision
        )
        for part in (training, validation)
    )
    n = min(len(training), len(validation))
    some = random.Random(seed).sample(range(len(training)), n)

    def evaluate() -> dict[str, float]:
        loss, accuracy = evaluate_classes(model, to_validate, precision)
        training_loss, training_accuracy = evaluate_classes(model, to_train, precision, some)
        return {
            "validation_loss": loss,
            "validation_accuracy": accuracy,
            "training_loss": training_loss,
            "training_accuracy": training_accuracy,
        }

    per_epoch = math.ceil(len(training) / flags.batch_size)
    steps = flags.steps or math.ceil(flags.epochs * per_epoch / get_world_size())
    settings = flags.run.settings(
        steps,
        precision,
        evaluate_every=min(steps, per_epoch),
        unit="texts",
        recompute=flags.method != "last-blocks",  # one block's activations are no burden
    )
    rows = train(
        model,
        shuffled_batches(to_train, flags.batch_size, seed),
        [adamw(model, lr=rate)],
        settings,
        loss_function=last_token_step,
        evaluate=evaluate,
        out=out,
        save=save,
        resume=flags.run.resume,
    )
    exit_unless_rank_zero()
    seconds = time.perf_counter() - began
    print_rows(rows, list(rows[0])[1:], where="validation_loss")

    model = load_classifier(flags, out, data.class_names, device)
    tokenizer.save_pretrained(out / "best")
    with autocast(device, precision):  # all as it was in training and validation
        found = predict(model, tokenizer, test.texts, data.class_names, flags.keep, longest)
    predicted = [data.class_names.index(one.class_name) for one in found]
    report = classification_report(test.labels, predicted, data.class_names)
    mistakes = confident_mistakes(test, found)
    print(f"{report}\n")
    print_mistakes(mistakes)
    write_summary(out, flags, summary(report, rows, seconds, mistakes))
    title = f"Classifying {Path(flags.data).name} ({flags.method})"
    plot = partial(plot_confusion, report.confusion, report.class_names)
    draw_losses(out, title, "nats per text", confusion=plot)
    print(f"classifier: {out / 'best'}, which transformers opens as GPT2ForSequenceClassification")


def load_classifier(flags: Flags, out: Path, names: list[str], device: torch.device) -> GPT2:
    """The best model; adapters are merged, so that `best` is a whole classifier."""
    is_adapter = holds_adapter(out / "best")  # not if a finished run is resumed: merged already
    model = load_best(flags.model, out, device, classifier=True)
    if is_adapter:
        merge_lora(model)
        model.save_pretrained(out / "best", class_names=names)
    return model


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
    report: ClassificationReport, rows: list[dict[str, Any]], seconds: float, mistakes: list
) -> dict[str, Any]:
    return {
        "steps": rows[-1]["step"],
        "seconds": round(seconds, 1),
        "validation_loss": min(r["validation_loss"] for r in rows if "validation_loss" in r),
        "test_accuracy": report.accuracy,
        "test_macro_f1": report.macro_f1,
        "majority_baseline": report.majority_baseline,
        "class_names": report.class_names,
        "confusion": report.confusion.tolist(),
        "mistakes": mistakes,
    }
