"""Classify new texts with a trained classifier, or measure it on labeled ones.

Examples:
  gpt2mini predict --text "WINNER! Claim your prize" "see you at six"   # by runs/classify/best
  gpt2mini predict --model runs/reviews/best --data new.csv --out predictions.jsonl
  gpt2mini predict --text - < lines.txt                                 # a text on each line
  gpt2mini predict --evaluate test.csv

Prints the class of each text and the probabilities of the likeliest classes. With --evaluate, whose
texts have labels, prints accuracy, macro-F1, the confusion matrix and the most confident mistakes.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt2mini import GPT2, Tokenizer
from gpt2mini.checkpoints import read_class_names
from gpt2mini.checkpoints.tokenizer_config import read_truncation
from gpt2mini.classification import Prediction, predict
from gpt2mini.classification.label_files import part_to_score, read_texts
from gpt2mini.classification.labeled import read_labeled
from gpt2mini.cli import options
from gpt2mini.cli.classify import report_on
from gpt2mini.cli.data import parse_columns
from gpt2mini.device import pick_device
from gpt2mini.files import local_path, text_writer, writable_folder, write_aside

DEFAULT = "runs/classify/best"


@dataclass(frozen=True)
class Flags:
    model: str = DEFAULT  # folder of a classifier
    text: options.Several = ()  # texts to classify; - reads them from stdin, one a line
    data: str | None = None  # a file of them: records with a text, or else a text on each line
    evaluate: str | None = None  # labeled texts, as in classify --data; of a folder those to test
    columns: str | None = None  # fields called otherwise: text=theirs,label=theirs
    out: str | None = None  # a file for text, class and probabilities of each, as JSON lines
    longest: options.OptionalCount = None  # tokens per text; None: as in training
    keep: Literal["head", "tail"] | None = None  # of a text that is longer; None: as in training
    computing: options.Computing = options.group(options.Computing)


def run(flags: Flags) -> None:
    check_asked(flags)
    if flags.model == DEFAULT and not Path(DEFAULT).exists():
        raise FileNotFoundError(
            f"there is no classifier in {DEFAULT}: train one with gpt2mini classify, or give the "
            "folder of another as --model"
        )
    if not (Path(flags.model) / "config.json").is_file():
        raise FileNotFoundError(
            f"{flags.model} is not the folder of a classifier, such as best/ in the --out of "
            "gpt2mini classify"
        )
    names = read_class_names(flags.model)
    if len(names) < 2:
        raise ValueError(f"{flags.model} has the one class {names[0]!r}: it is no classifier")
    out = writable_file(flags.out) if flags.out else None
    labeled = None
    if flags.evaluate:
        part = part_to_score(flags.evaluate)
        labeled = read_labeled(flags.evaluate, parse_columns(flags.columns), names, part)
    texts = labeled.texts if labeled else asked_texts(flags)
    model = GPT2.from_pretrained(flags.model, device=pick_device(flags.computing.device))
    tokenizer = Tokenizer.from_pretrained(flags.model)
    trained_longest, trained_keep = read_truncation(flags.model)
    context = model.config.context_length
    longest = min(flags.longest or trained_longest or context, context)
    found = predict(model, tokenizer, texts, names, flags.keep or trained_keep, longest)
    if labeled:
        report_on(labeled, found)
    else:
        print_predictions(texts, found)
    if out:
        write_predictions(out, texts, found)
        print(f"predictions: {flags.out}")


def check_asked(flags: Flags) -> None:
    """Raise ValueError for flags of which one would be ignored."""
    texts = options.flat(flags.text)
    if flags.evaluate and (texts or flags.data):
        raise ValueError(
            "--evaluate measures the classifier on labeled texts: leave out --text and --data, or "
            "--evaluate to classify those"
        )
    if flags.columns and not (flags.data or flags.evaluate):
        raise ValueError("--columns is for --data and --evaluate")
    if "-" in texts and len(texts) > 1:
        raise ValueError("--text - reads the texts from stdin: give it alone")


def writable_file(name: str) -> Path:
    """The path of a file to be written, its folder made: before long work, not after."""
    path = local_path(name)
    if path.is_dir():
        raise IsADirectoryError(
            f"--out {path} is a folder: give a file, such as {path / 'a.jsonl'}"
        )
    return writable_folder(path.parent) / path.name


def asked_texts(flags: Flags) -> list[str]:
    given = options.flat(flags.text)
    texts = [] if given == ["-"] else given
    if given == ["-"]:
        texts += [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if flags.data:
        texts += read_texts(flags.data, parse_columns(flags.columns))
    if not texts:
        raise ValueError(
            "there is nothing to classify: give --text TEXT ..., --data FILE, or --evaluate FILE"
        )
    return texts


def print_predictions(texts: Sequence[str], found: Sequence[Prediction]) -> None:
    for text, one in zip(texts, found, strict=True):
        likeliest = sorted(one.probabilities.items(), key=lambda pair: -pair[1])[:3]
        shown = ", ".join(f"{name} {probability:.3f}" for name, probability in likeliest)
        print(f"{one.class_name}\t({shown})\t{' '.join(text.split())[:80]}")


def write_predictions(path: Path, texts: Sequence[str], found: Sequence[Prediction]) -> None:
    rows = (
        {"text": text, "label": one.class_name, "probabilities": one.probabilities}
        for text, one in zip(texts, found, strict=True)
    )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_aside(path, text_writer(lines))
