"""Labeled texts: files -> balanced, split, padded batches for classification."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from gpt2mini.classification.class_names import as_seen, class_name, in_order, warn_if_alike
from gpt2mini.classification.label_files import Labeled, read_pairs
from gpt2mini.data.splitting import split_groups
from gpt2mini.masking import pad_right

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabeledTexts:
    """Texts and the number of each one's class; the names of the classes, in order."""

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


def read_labeled(
    source: str | Path,
    columns: Mapping[str, str] | None = None,
    class_names: Sequence[str] | None = None,
    purpose: str = "train",
) -> LabeledTexts:
    """Read labeled texts.

    source: a table with a header (.csv, .tsv, .jsonl, .json, .parquet, also compressed, or
    hf:owner/name:split), lines of label<TAB>text or of fastText, a folder of such tables, or a
    folder with one folder of texts for each class: pos/ and neg/, or train/pos/ and so on, where
    train/ itself is no class, nor are unsup/ and unlabeled/. The label and the text are the fields
    called so, or by another usual name, or what `columns` says: {"label": "stars"}.
    class_names: those of the training data, for texts to test with; by default they are the labels
    found, numbers in the order of their values. purpose: which part of a folder: "train",
    "validation" or "test".

    Texts that are empty, or without a label, and files of a folder that hold no labeled text are
    left out; warnings give their numbers, and name classes that differ little and texts with more
    than one label. Raises ValueError, with the line, for what cannot be read, for columns of which
    it is not certain which is which, for labels that are not of `class_names`, and for a file with
    fewer than two classes.
    """
    pairs = with_both(list(read_pairs(source, columns, purpose)), source)
    counts = Counter(name for name, _ in pairs)
    names = in_order(list(counts)) if class_names is None else list(class_names)
    if class_names is None:
        check_classes(names, len(pairs), source)
        warn_if_alike({name: counts[name] for name in names}, source)
    elif not pairs:
        raise ValueError(f"{source} has no labeled text: there is nothing to measure on")
    elif unknown := [f"{name!r} ({counts[name]})" for name in counts if name not in names]:
        raise ValueError(
            f"{source} has classes that the training data lack: {', '.join(unknown)}; they are "
            f"{', '.join(map(repr, names))}"
        )
    warn_if_contradictory(pairs, source)
    number = {name: i for i, name in enumerate(names)}
    return LabeledTexts([text for _, text in pairs], [number[name] for name, _ in pairs], names)


def with_both(found: Sequence[Labeled], source: str | Path) -> list[tuple[str, str]]:
    """(class name, text) of all that have both; the others are counted in a warning."""
    pairs, without_text, without_label = [], 0, Counter[str]()
    for label, text, place in found:
        try:
            name = class_name(label)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if not as_seen(text):
            without_text += 1
        elif name is None:
            without_label[str(label)] += 1
        else:
            pairs.append((name, text))
    if without_text:
        message = "%s: %d of %d texts are empty and were left out"
        logger.warning(message, source, without_text, len(found))
    if without_label:
        message = "%s: %d of %d texts have no label and were left out; theirs: %s"
        shown = ", ".join(f"{label!r} ({count})" for label, count in without_label.items())
        logger.warning(message, source, without_label.total(), len(found), shown)
    return pairs


def check_classes(names: Sequence[str], n_texts: int, source: str | Path) -> None:
    """Raise ValueError for too few classes, or so many that they must be something else."""
    if len(names) < 2:
        what = f"only the class {names[0]!r}" if names else "no labeled text"
        raise ValueError(f"{source} has {what}: there is nothing to tell apart")
    if len(names) > max(10, n_texts // 2):
        raise ValueError(
            f"{source} has {len(names)} classes in {n_texts} texts, {names[0]!r} first: is that "
            "the column of the labels?"
        )


def warn_if_contradictory(pairs: Sequence[tuple[str, str]], source: str | Path) -> None:
    """Say how many different texts stand under more than one label."""
    labels: dict[str, set[str]] = {}
    for name, text in pairs:
        labels.setdefault(same_text(text), set()).add(name)
    several = [text for text, names in labels.items() if len(names) > 1]
    if several:
        names = " and ".join(map(repr, in_order(list(labels[several[0]]))))
        message = (
            "%s: %d texts have more than one label, of which at most one can be learned: %r %s"
        )
        logger.warning(message, source, len(several), several[0][:60], names)


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
    data: LabeledTexts, shares: Sequence[float], seed: int
) -> tuple[LabeledTexts, ...]:
    """Parts, the first of them for training: every class in the same shares in each, as nearly as
    texts that stand more than once allow, for they stay together.

    shares: (0.7, 0.1, 0.2) gives training, validation and test. A class is in all parts if it has
    that many different texts, and else in training alone. Raises ValueError if a part would be
    empty.
    """
    generator = np.random.default_rng(seed)
    parts: list[list[int]] = [[] for _ in shares]
    for name, groups in same_texts_by_class(data).items():
        if len(groups) < len(shares):
            message = "the class %r has too few different texts (%d) to be held out from: all learn"
            logger.warning(message, name, len(groups))
            parts[0].extend(i for members in groups for i in members)
            continue
        for part, found in zip(parts, split_groups(groups, shares, generator), strict=True):
            part.extend(found)
    if not all(parts):
        raise ValueError(f"{len(data)} texts are too few for {len(shares)} parts")
    return tuple(data.subset(sorted(part)) for part in parts)


def same_texts_by_class(data: LabeledTexts) -> dict[str, list[list[int]]]:
    """Indices of texts that are the same, by the class of the first of them."""
    groups: dict[str, list[int]] = {}
    for i, text in enumerate(data.texts):
        groups.setdefault(same_text(text), []).append(i)
    found: dict[str, list[list[int]]] = {name: [] for name in data.class_names}
    for members in groups.values():
        found[data.class_names[data.labels[members[0]]]].append(members)
    return found


def same_text(text: str) -> str:
    """What is equal for texts that differ in case, white space or invisible characters alone."""
    return as_seen(text).casefold()


def count_overlap(training: LabeledTexts, held_out: LabeledTexts) -> int:
    """How many of the texts held out stand in the training data too."""
    seen = set(map(same_text, training.texts))
    return sum(same_text(text) in seen for text in held_out.texts)


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
