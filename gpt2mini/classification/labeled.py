"""Labeled texts: files -> balanced, split, padded batches for classification."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from gpt2mini.data.records import HUB, numbered_lines, read_records
from gpt2mini.masking import pad_right

logger = logging.getLogger(__name__)

LABEL_NAMES = ("label", "class", "category", "sentiment", "target")  # of a column or a JSON key
TEXT_NAMES = ("text", "sentence", "message", "review", "content")


@dataclass(frozen=True)
class LabeledTexts:
    """Texts and the number of each one's class; the names of the classes in alphabetical order."""

    texts: list[str]
    labels: list[int]
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, indices: Sequence[int]) -> "LabeledTexts":
        return LabeledTexts(
            [self.texts[i] for i in indices], [self.labels[i] for i in indices], self.class_names
        )

    def counts(self) -> dict[str, int]:
        """How many texts each class has."""
        numbers = np.bincount(self.labels, minlength=len(self.class_names)).tolist()
        return dict(zip(self.class_names, numbers, strict=True))


# ---- files


def read_labeled(source: str | Path, columns: Mapping[str, str] | None = None) -> LabeledTexts:
    """Read records (.csv, .jsonl, .json, hf:owner/name:split) or else `label<TAB>text` lines.

    The label and the text are the fields called so, or by another usual name, or what `columns`
    says: {"label": "stars"}. Empty texts are left out; how many, is said in a warning. Raises
    ValueError, with the number of the line, for one that is none of these, for invalid UTF-8, and
    for a file with fewer than two classes.
    """
    path = Path(source)
    if str(source).startswith(HUB) or path.suffix.lower() in (".csv", ".jsonl", ".json"):
        found = list(read_named(source, columns))
    elif columns:
        raise ValueError(f"{path} is read as label<TAB>text lines, which have no named columns")
    elif path.is_file():
        found = list(read_tsv(path))
    else:
        raise FileNotFoundError(f"{path} is no file of labeled texts")
    pairs = [(label, text) for label, text in found if text.strip()]
    if len(pairs) < len(found):
        message = "%s: %d of %d texts are empty and were left out"
        logger.warning(message, source, len(found) - len(pairs), len(found))
    class_names = sorted({label for label, _ in pairs})
    if len(class_names) < 2:
        what = f"only the class {class_names[0]!r}" if pairs else "no labeled text"
        raise ValueError(f"{source} has {what}: there is nothing to tell apart")
    if len(class_names) > max(10, len(pairs) // 2):
        raise ValueError(
            f"{source} has {len(class_names)} classes in {len(pairs)} texts, {class_names[0]!r} "
            "first: is that the column of the labels?"
        )
    number = {name: i for i, name in enumerate(class_names)}
    return LabeledTexts(
        [text for _, text in pairs], [number[label] for label, _ in pairs], class_names
    )


def read_tsv(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in numbered_lines(path):
        label, tab, text = line.partition("\t")
        if not tab or not label.strip():
            raise ValueError(f"{path}, line {number}: expected label<TAB>text, found {line[:60]!r}")
        is_header = label.strip().lower() in LABEL_NAMES and text.strip().lower() in TEXT_NAMES
        if number == 1 and is_header:
            continue
        yield label.strip(), text


def read_named(source: str | Path, columns: Mapping[str, str] | None) -> Iterator[tuple[str, str]]:
    for record in read_records(source, columns, (*LABEL_NAMES, *TEXT_NAMES)):
        name = record.find(LABEL_NAMES)
        text = record.text(*TEXT_NAMES)
        if name is None:
            raise record.lacks(LABEL_NAMES)
        if text is None:
            raise record.lacks(TEXT_NAMES)
        label = record.fields[name]
        if isinstance(label, dict | list) or label is None or not str(label).strip():
            raise ValueError(f"{record.place}: {name!r} must name a class, not {label!r}")
        if isinstance(label, float) and label.is_integer():
            label = int(label)  # 1.0 in JSON is the class 1
        yield str(label).strip(), text


# ---- choosing


def balanced(data: LabeledTexts, seed: int) -> LabeledTexts:
    """As many texts of every class as the rarest has, a seeded choice, in the order of the file."""
    generator = np.random.default_rng(seed)
    labels = np.array(data.labels)
    fewest = min(count for count in data.counts().values())
    chosen = [
        generator.choice(np.flatnonzero(labels == label), fewest, replace=False)
        for label in range(len(data.class_names))
    ]
    return data.subset(np.sort(np.concatenate(chosen)).tolist())


def stratified_split(
    data: LabeledTexts, shares: tuple[float, float, float], seed: int
) -> tuple[LabeledTexts, LabeledTexts, LabeledTexts]:
    """(training, validation, test): every class in the same shares in each, up to rounding.

    A class with one text keeps it for training; from three texts on, a class is in all three.
    Raises ValueError if a part would be empty.
    """
    generator = np.random.default_rng(seed)
    labels = np.array(data.labels)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for label, name in enumerate(data.class_names):
        members = generator.permutation(np.flatnonzero(labels == label)).tolist()
        n = len(members)
        least = 1 if n >= 3 else 0
        n_validation = max(least, round(shares[1] * n))
        n_test = min(max(least, round(shares[2] * n)), n - n_validation - 1)
        if n < 3:
            logger.warning("the class %r has only %d texts: it cannot be tested", name, n)
            n_validation = n_test = 0
        parts[0].extend(members[n_validation + n_test :])
        parts[1].extend(members[:n_validation])
        parts[2].extend(members[n_validation : n_validation + n_test])
    if not all(parts):
        raise ValueError(f"{len(data)} texts are too few to train, validate and test")
    training, validation, test = (data.subset(sorted(part)) for part in parts)
    return training, validation, test


# ---- batches


@dataclass(frozen=True)
class LabeledBatch:
    """Texts side by side, each with its class. `attention_mask` None: all tokens are real."""

    token_ids: Int[Tensor, "batch tokens"]
    labels: Int[Tensor, " batch"]
    attention_mask: Int[Tensor, "batch tokens"] | None = None

    def to(self, device: torch.device) -> "LabeledBatch":
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return LabeledBatch(self.token_ids.to(device), self.labels.to(device), mask)


def pad_texts(rows: Sequence[Tensor], labels: Sequence[int]) -> LabeledBatch:
    """Right-pad to the longest of the batch; the mask comes from the lengths."""
    token_ids, is_real = pad_right(rows)  # (batch, tokens), both
    mask = None if is_real.all() else is_real.long()
    return LabeledBatch(token_ids, torch.tensor(labels), mask)
