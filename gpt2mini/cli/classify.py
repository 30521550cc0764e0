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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from gpt2mini import GPT2
from gpt2mini.checkpoints import holds_adapter
from gpt2mini.classification import predict
from gpt2mini.classification.frozen import (
    LabeledBatches,
    evaluate_classes,
    last_token_step,
    texts_to_train_on,
)
from gpt2mini.classification.labeled import LabeledTexts, balanced, read_labeled, stratified_split
from gpt2mini.cli import common, options
from gpt2mini.cli.data import parse_columns
from gpt2mini.data.batching import encode_texts
from gpt2mini.data.samples import sample
from gpt2mini.device import autocast
from gpt2mini.evaluation import classification_report
from gpt2mini.inspection import plot_confusion
from gpt2mini.lora import merge_lora
from gpt2mini.training import adamw
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
    epochs: options.Positive = 5.0  # times through the data
    steps: options.OptionalCount = None  # optimizer steps; overrides --epochs
    batch_size: options.Count = 8  # texts per step
    lr: options.OptionalPositive = None  # peak learning rate; None: by method and size
    longest: options.OptionalCount = None  # tokens per text; None: the context
    keep: Literal["head", "tail"] = "head"  # of a text that is longer
    blocks: options.LastBlocks = options.group(options.LastBlocks, "--method last-blocks")
    lora: options.LoRA = options.group(options.LoRA, "--method lora")
    run: options.Run = options.group(options.Run)
    parallel: options.Sharding = options.group(options.Sharding)
    machine: options.Machine = options.group(options.Machine)

    @property
    def conditions(self) -> set[str]:
        return {f"--method {self.method}"}


def run(flags: Flags) -> None:
    job = common.Job(flags, flags.model)
    data = read_labeled(flags.data, parse_columns(flags.columns))
    if flags.balance:
        data = balanced(data, job.seed)
    training, validation, test = stratified_split(data, SHARES, job.seed)
    names = data.class_names
    model, tokenizer = job.load()
    model.out_head = nn.Linear(model.config.emb_dim, len(names), bias=False).to(job.device)
    common.choose_what_learns(model, flags.method, flags.blocks, flags.lora)
    model.out_head.requires_grad_(True)
    learning, total = common.how_many_learn(model)
    print(
        f"{len(data)} texts: {', '.join(f'{n} {name}' for name, n in data.counts().items())}\n"
        f"{len(training)} to learn from, {len(validation)} to validate, {len(test)} to test; "
        f"{learning:,} of {total:,} parameters learn ({flags.method})"
    )

    rate = flags.lr or PEAK_RATES[flags.method] * (4 if common.is_small(model) else 1)
    save = common.how_to_save(model, partial(GPT2.save_pretrained, class_names=names))
    flags.parallel.apply(model, job.precision)
    longest = min(flags.longest or model.config.context_length, model.config.context_length)
    to_train, to_validate = (
        texts_to_train_on(
            *(model, encode_texts(part.texts, tokenizer, longest, flags.keep)),
            *(part.labels, job.precision),
        )
        for part in (training, validation)
    )
    n = min(len(training), len(validation))
    some = random.Random(job.seed).sample(range(len(training)), n)

    def evaluate() -> dict[str, float]:
        loss, accuracy = evaluate_classes(model, to_validate, job.precision)
        found = {"validation_loss": loss, "validation_accuracy": accuracy}
        loss, accuracy = evaluate_classes(model, to_train, job.precision, some)
        return found | {"training_loss": loss, "training_accuracy": accuracy}

    per_epoch = math.ceil(len(training) / flags.batch_size)
    steps = flags.steps or math.ceil(flags.epochs * per_epoch / get_world_size())
    rows = job.train(
        model,
        LabeledBatches(to_train, flags.batch_size, job.seed),
        [adamw(model, rate)],
        steps,
        last_token_step,
        evaluate,
        save,
        evaluate_every=min(steps, per_epoch),
        unit="texts",
        recompute=flags.method != "last-blocks",  # one block's activations are no burden
    )
    common.print_rows(rows, list(rows[0])[1:], where="validation_loss")
    best = job.out / "best"
    model = load_classifier(job, names)
    tokenizer.save_pretrained(best)
    with autocast(job.device, job.precision):  # all as it was in training and validation
        found = predict(model, tokenizer, test.texts, names, flags.keep, longest)
    predicted = [names.index(one.class_name) for one in found]
    report = classification_report(test.labels, predicted, names)
    mistakes = confident_mistakes(test, found)
    print(f"{report}\n")
    print_mistakes(mistakes)
    summary = {
        "validation_loss": min(r["validation_loss"] for r in rows if "validation_loss" in r),
        "test_accuracy": report.accuracy,
        "test_macro_f1": report.macro_f1,
        "majority_baseline": report.majority_baseline,
        "class_names": report.class_names,
        "confusion": report.confusion.tolist(),
        "mistakes": mistakes,
    }
    title = f"Classifying {Path(flags.data).name} ({flags.method})"
    plot = partial(plot_confusion, report.confusion, report.class_names)
    job.finish(summary, title, "nats per text", confusion=plot)
    print(f"classifier: {best}, which transformers opens as GPT2ForSequenceClassification")


def load_classifier(job: common.Job, names: list[str]) -> GPT2:
    """The best model; adapters are merged, so that `best` is a whole classifier."""
    best = job.out / "best"
    is_adapter = holds_adapter(best)  # not if a finished run is resumed: merged already
    model = job.load_best(classifier=True)
    if is_adapter:
        merge_lora(model)
        model.save_pretrained(best, class_names=names)
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
