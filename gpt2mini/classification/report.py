"""How well does a classifier tell classes apart?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH = 80  # columns of characters of a table


@dataclass(frozen=True)
class ClassificationReport:
    """Figures of a test. Where a class was never predicted, its precision counts as 0."""

    class_names: list[str]
    confusion: np.ndarray  # (classes, classes): rows are the truth, columns what was predicted

    @property
    def n_texts(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return float(self.confusion.trace() / self.n_texts)

    @property
    def majority_baseline(self) -> float:
        """The accuracy of always answering with the most frequent class."""
        return float(self.confusion.sum(axis=1).max() / self.n_texts)

    @property
    def precision(self) -> np.ndarray:
        """Of the texts predicted to be of a class, the share that is."""
        return divide(self.confusion.diagonal(), self.confusion.sum(axis=0))

    @property
    def recall(self) -> np.ndarray:
        """Of the texts of a class, the share that was found."""
        return divide(self.confusion.diagonal(), self.confusion.sum(axis=1))

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall of each class."""
        return divide(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def is_present(self) -> np.ndarray:
        """Whether a class is that of any text, or was predicted for any."""
        return self.confusion.sum(axis=0) + self.confusion.sum(axis=1) > 0

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes, rare and frequent ones alike, as scikit-learn's default: of those
        that are the truth or the prediction of any text. On a class that the test set lacks nothing
        can be said."""
        return float(self.f1[self.is_present].mean())

    def __str__(self) -> str:
        """Figures of each class, and the confusion matrix, in 80 columns."""
        present, classes = int(self.is_present.sum()), len(self.class_names)
        of_classes = f" (of the {present} classes present)" if present < classes else ""
        totals = (
            f"accuracy {self.accuracy:.3f} on {self.n_texts} texts "
            f"(always the most frequent class: {self.majority_baseline:.3f}),\n"
            f"macro-F1 {self.macro_f1:.3f}{of_classes}"
        )
        return f"{self.table_of_classes()}\n\n{totals}\n\n{self.table_of_confusions()}"

    def table_of_classes(self) -> str:
        names = [shortened(name) for name in self.class_names]
        width = max(8, *map(len, names))
        lines = [f"{'':{width}}  precision  recall     F1  texts"]
        for i, name in enumerate(names):
            figures = f"{self.precision[i]:9.3f}  {self.recall[i]:6.3f}  {self.f1[i]:5.3f}"
            if not self.is_present[i]:
                figures = f"{'-':>9}  {'-':>6}  {'-':>5}"
            lines.append(f"{name:{width}}  {figures}  {self.confusion[i].sum():5d}")
        return "\n".join(lines)

    def table_of_confusions(self) -> str:
        """The matrix below the names of the classes; of many classes below their numbers; of still
        more the most frequent confusions."""
        names = [shortened(name) for name in self.class_names]
        numbers = [str(i) for i in range(1, len(names) + 1)]
        numbered = [f"{i} {name}" for i, name in zip(numbers, names, strict=True)]
        for truth, predicted, gap in ((names, names, "  "), (numbered, numbers, " ")):
            lines = self.matrix(truth, predicted, gap)
            if max(map(len, lines)) <= WIDTH:
                return "\n".join(lines)
        return "\n".join(["the most frequent confusions:", *self.frequent_confusions(names)])

    def matrix(self, truth: Sequence[str], predicted: Sequence[str], gap: str) -> list[str]:
        """Lines, one for each row of the confusion matrix, below two with the names."""
        left = max(5, *map(len, truth))
        cell = max(len(str(self.confusion.max())), *map(len, predicted))
        lines = [f"{'truth':{left}}  predicted"]
        for name, row in zip(["", *truth], [predicted, *self.confusion.tolist()], strict=True):
            lines.append(f"{name:{left}}  " + gap.join(f"{x:>{cell}}" for x in row))
        return lines

    def frequent_confusions(self, names: Sequence[str], n: int = 12) -> list[str]:
        """The largest counts beside the diagonal."""
        wrong = self.confusion - np.diag(self.confusion.diagonal())
        order = np.argsort(-wrong, axis=None, kind="stable")[:n]
        places = [divmod(int(i), len(names)) for i in order if wrong.flat[i]]
        found = [f"{wrong[t, p]:5d}  {names[t]} taken for {names[p]}" for t, p in places]
        return found or ["    none"]


def shortened(name: str, longest: int = 24) -> str:
    """Without the middle of a long name, as long ones often begin or end alike."""
    half = longest // 2
    return name if len(name) <= longest else f"{name[: longest - half - 1]}\u2026{name[-half:]}"


def divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """0 where there is nothing to divide by."""
    return np.divide(above, below, out=np.zeros(len(above)), where=below > 0)


def classification_report(
    truth: Sequence[int], predicted: Sequence[int], class_names: Sequence[str]
) -> ClassificationReport:
    """The report of predicted class numbers beside the true ones.

    Raises ValueError if there are none, if their numbers differ, or for a number without a name.
    """
    if len(truth) == 0 or len(truth) != len(predicted):
        raise ValueError(f"{len(predicted)} predictions for {len(truth)} texts")
    numbers = np.array([truth, predicted])
    if numbers.min() < 0 or numbers.max() >= len(class_names):
        raise ValueError(f"class numbers must lie in 0 to {len(class_names) - 1}")
    confusion = np.zeros((len(class_names), len(class_names)), dtype=np.int64)
    np.add.at(confusion, (numbers[0], numbers[1]), 1)
    return ClassificationReport(list(class_names), confusion)
