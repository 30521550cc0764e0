"""Train a model to tell classes of texts apart, and see what it gets right and wrong.

Examples:
  gpt2mini classify                                       # a minute, on bundled messages
  gpt2mini classify --model gpt2 --data SMSSpamCollection --balance
  gpt2mini classify --data reviews.csv --columns label=stars --method lora --epochs 3
  gpt2mini classify --data train.csv --held-out test.csv

The data are label<TAB>text lines, or records (.jsonl, .json, .csv, .tsv, .parquet,
hf:owner/name:split) with label and text, of any number of classes; or a folder that holds a folder
of texts for each class, or such files for training, validation and test by their names. A text that
stands more than once is either learned or tested with, never both. The head is replaced by one
output per class, read at the last token of each text. Writes metrics.jsonl, summary.json, loss.png,
confusion.png and best/, the classifier with the lowest validation loss, to --out.
"""

import logging
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any, Literal

from torch import nn

from gpt2mini import GPT2, Tokenizer
from gpt2mini.checkpoints import holds_adapter
from gpt2mini.checkpoints.tokenizer_config import write_truncation
from gpt2mini.classification import ClassificationReport, Prediction, predict
from gpt2mini.classification.frozen import (
    LabeledBatches,
    evaluate_classes,
    last_token_step,
    texts_to_train_on,
)
from gpt2mini.classification.label_files import part_to_score, parts_of
from gpt2mini.classification.labeled import (
    LabeledTexts,
    balanced,
    count_overlap,
    read_labeled,
    stratified_split,
)
from gpt2mini.classification.report import shortened
from gpt2mini.cli import common, options
from gpt2mini.cli.data import parse_columns
from gpt2mini.cli.tables import print_rows
from gpt2mini.data.batching import encode_texts
from gpt2mini.data.samples import sample
from gpt2mini.device import autocast
from gpt2mini.evaluation import classification_report
from gpt2mini.inspection import plot_confusion
from gpt2mini.lora import merge_lora
from gpt2mini.training import adamw
from gpt2mini.training.distributed import get_world_size

logger = logging.getLogger(__name__)

# of the 124M model; small ones take four times these rates
PEAK_RATES = {"last-blocks": 5e-4, "full": 5e-5, "lora": 5e-4}
SHARES = {"training": 0.7, "validation": 0.1, "test": 0.2}


@dataclass(frozen=True)
class Flags:
    model: str = "gpt2-nano"  # a model's folder or name
    data: str = str(sample("messages.tsv"))  # records, label<TAB>text lines, or a folder
    held_out: str | None = None  # labeled texts to test with, instead of a share of the data
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
    parts = read_parts(flags, job.seed)
    names = parts.training.class_names
    model, tokenizer = job.load()
    model.out_head = nn.Linear(model.config.emb_dim, len(names), bias=False).to(job.device)
    common.choose_what_learns(model, flags.method, flags.blocks, flags.lora)
    model.out_head.requires_grad_(True)
    learning, total = common.how_many_learn(model)
    print(parts)
    print(f"{learning:,} of {total:,} parameters learn ({flags.method})")

    longest = min(flags.longest or model.config.context_length, model.config.context_length)
    rows = train_classifier(job, model, tokenizer, parts, longest)
    print_rows(rows, list(rows[0])[1:], where="validation_loss")
    best = job.out / "best"
    model = load_classifier(job, names)
    tokenizer.save_pretrained(best)
    write_truncation(best, longest, flags.keep)  # for predict
    with autocast(job.device, job.precision):  # all as it was in training and validation
        found = predict(model, tokenizer, parts.test.texts, names, flags.keep, longest)
    summary, report = report_on(parts.test, found)
    summary["validation_loss"] = common.lowest_loss(rows)
    title = f"Classifying {Path(flags.data).name} ({flags.method})"
    plot = partial(plot_confusion, report.confusion, report.class_names)
    job.finish(summary, title, "nats per text", confusion=plot)
    print(f"classifier: {best}, which transformers opens as GPT2ForSequenceClassification")
    print(f'  gpt2mini predict --model {best} --text "..."')


def train_classifier(
    job: common.Job, model: GPT2, tokenizer: Tokenizer, parts: "Parts", longest: int
) -> list[dict[str, Any]]:
    """Train in place; the model with the lowest validation loss lands in best/."""
    flags, training, validation = job.flags, parts.training, parts.validation
    rate = flags.lr or PEAK_RATES[flags.method] * (4 if common.is_small(model) else 1)
    whole = partial(GPT2.save_pretrained, class_names=training.class_names)
    save = common.how_to_save(model, whole)
    flags.parallel.apply(model, job.precision)
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

    batches = LabeledBatches(to_train, flags.batch_size, job.seed)
    steps = flags.steps or math.ceil(flags.epochs * len(batches) / get_world_size())
    return job.train(
        model,
        batches,
        [adamw(model, rate)],
        *(steps, last_token_step, evaluate, save),
        evaluate_every=min(steps, len(batches)),
        unit="texts",
        recompute=flags.method != "last-blocks",  # one block's activations are no burden
    )


# ---- the data


@dataclass(frozen=True)
class Parts:
    """Labeled texts to learn from, to choose the best model by, and to measure it on."""

    training: LabeledTexts
    validation: LabeledTexts
    test: LabeledTexts
    source_of_test: str

    def __str__(self) -> str:
        counts: Counter[str] = Counter()
        for part in (self.training, self.validation, self.test):
            counts.update(part.counts())
        classes = f"{counts.total()} texts: {', '.join(f'{n} {c}' for c, n in counts.items())}"
        return (
            f"{fill(classes, 80, subsequent_indent='  ')}\n"
            f"{len(self.training)} to learn from, {len(self.validation)} to validate, "
            f"{len(self.test)} to test ({self.source_of_test})"
        )


def read_parts(flags: Flags, seed: int) -> Parts:
    """The test set is the file `--held-out`, else the test part of a folder, else a share of the
    data; the validation set is that part of a folder, else a share of the data."""
    columns = parse_columns(flags.columns)
    data = read_labeled(flags.data, columns)
    names, folder = data.class_names, parts_of(flags.data)
    given = {}
    if folder["validation"]:
        given["validation"] = read_labeled(flags.data, columns, names, "validation")
    if flags.held_out:
        purpose = part_to_score(flags.held_out)
        given["test"] = read_labeled(flags.held_out, columns, names, purpose)
    elif folder["test"]:
        given["test"] = read_labeled(flags.data, columns, names, "test")
    for part in given.values():
        warn_of_test(data, part)
    if flags.balance:
        data = balanced(data, seed)
    shares = {name: share for name, share in SHARES.items() if name not in given}
    found = stratified_split(data, [s / sum(shares.values()) for s in shares.values()], seed)
    parts = dict(zip(shares, found, strict=True)) | given
    files = [flags.held_out] if flags.held_out else [path.name for path in folder["test"]]
    return Parts(**parts, source_of_test=", ".join(files) or "a share of each class")


def warn_of_test(training: LabeledTexts, held_out: LabeledTexts) -> None:
    """Say what a test set of the user's own cannot tell."""
    if overlap := count_overlap(training, held_out):
        message = "%d of %d texts held out are learned from too: their accuracy says less"
        logger.warning(message, overlap, len(held_out))
    if lacking := [name for name, count in held_out.counts().items() if not count]:
        logger.warning("the texts held out have none of the classes %s", ", ".join(lacking))


# ---- the result


def load_classifier(job: common.Job, names: list[str]) -> GPT2:
    """The best model; adapters are merged, so that `best` is a whole classifier."""
    best = job.out / "best"
    is_adapter = holds_adapter(best)  # not if a finished run is resumed: merged already
    model = job.load_best(classifier=True)
    if is_adapter:
        merge_lora(model)
        model.save_pretrained(best, class_names=names)
    return model


def report_on(
    test: LabeledTexts, found: Sequence[Prediction]
) -> tuple[dict[str, Any], ClassificationReport]:
    """Print how well the classes are told apart; the figures for the summary, and the report."""
    names = test.class_names
    predicted = [names.index(one.class_name) for one in found]
    report = classification_report(test.labels, predicted, names)
    mistakes = confident_mistakes(test, found)
    print(f"{report}\n")
    print_mistakes(mistakes)
    summary = {
        "test_accuracy": report.accuracy,
        "test_macro_f1": report.macro_f1,
        "majority_baseline": report.majority_baseline,
        "class_names": report.class_names,
        "confusion": report.confusion.tolist(),
        "mistakes": mistakes,
    }
    return summary, report


def confident_mistakes(test: LabeledTexts, found: Sequence[Prediction]) -> list[dict[str, Any]]:
    """The ten wrong answers of which the model was most certain."""
    wrong: list[dict[str, Any]] = [
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
        predicted, truth = shortened(mistake["predicted"]), shortened(mistake["truth"])
        print(f"  {predicted} ({mistake['probability']:.2f}), truly {truth}:")
        print(f"    {mistake['text'][:70]!r}")
