"""Multiple-choice tasks: HellaSwag and the Children's Book Test.

Nothing is generated. The choice is the ending with the highest probability after the context.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2mini.data.decoding import numbered_lines
from gpt2mini.data.records import EmptyField, Record
from gpt2mini.evaluation.continuations import Continuation, score_continuations
from gpt2mini.evaluation.detokenizers import detokenize_penn
from gpt2mini.evaluation.table import PAPER, Options, Row, percent
from gpt2mini.evaluation.task_files import read_examples
from gpt2mini.model import GPT2
from gpt2mini.tokenizer import Tokenizer

BLANK = "XXXXX"  # the gap in a question of the Children's Book Test


@dataclass(frozen=True)
class Question:
    """A context, its possible endings, and the index of the right one."""

    context: str
    endings: list[str]
    right: int


def hellaswag(model: GPT2, tokenizer: Tokenizer, path: Path, options: Options) -> list[Row]:
    """Accuracy by the log-probability of the whole ending, and by that per character, which does
    not prefer short endings (`acc_norm` of the Language Model Evaluation Harness). HellaSwag
    (Zellers et al. 2019) is newer than the GPT-2 paper, which has no figure."""
    questions = read_hellaswag(path)[: options.limit]
    logprobs = score_endings(model, tokenizer, questions, options)
    per_character = [
        [
            logprob / max(1, len(ending) - 1)  # without the space that was put before it
            for logprob, ending in zip(row, q.endings, strict=True)
        ]
        for row, q in zip(logprobs, questions, strict=True)
    ]
    n = len(questions)
    acc, acc_norm = accuracy(logprobs, questions), accuracy(per_character, questions)
    return [
        Row("HellaSwag", "accuracy %", acc, n, "questions", "log p of the whole ending"),
        Row("HellaSwag", "normalized acc. %", acc_norm, n, "questions", "log p per character"),
    ]


def childrens_books(
    model: GPT2, tokenizer: Tokenizer, path: Path, options: Options, task: str
) -> list[Row]:
    """Accuracy on the Children's Book Test (Hill et al. 2016): 20 sentences, a 21st with a gap, and
    ten candidates for it. As in the GPT-2 paper (section 3.2), the score is the probability of the
    word and of the rest of its sentence, and the text is de-tokenized."""
    questions = read_childrens_books(path)[: options.limit]
    found = accuracy(score_endings(model, tokenizer, questions, options), questions)
    setting = "log p of word and rest of sentence, de-tokenized"
    return [Row(task, "accuracy %", found, len(questions), "questions", setting, PAPER[task])]


def score_endings(
    model: GPT2, tokenizer: Tokenizer, questions: Sequence[Question], options: Options
) -> list[list[float]]:
    """log p of every ending of every question."""
    continuations = [
        Continuation.of(tokenizer, one.context, ending)
        for one in questions
        for ending in one.endings
    ]
    scores = iter(
        score_continuations(
            model, continuations, precision=options.precision, progress=options.progress
        )
    )
    return [[next(scores).logprob for _ in one.endings] for one in questions]


def accuracy(scores: Sequence[Sequence[float]], questions: Sequence[Question]) -> float:
    """Percent of the questions whose right ending has the highest score."""
    chosen = [row.index(max(row)) for row in scores]
    return percent([i == one.right for i, one in zip(chosen, questions, strict=True)])


# ---- files


def read_hellaswag(path: Path) -> list[Question]:
    """JSONL with `ctx`, `endings` and `label`, the index of the right ending; or as published."""
    return read_examples(path, read_hellaswag_record)


def read_hellaswag_record(record: Record) -> Question:
    endings, label = record.fields.get("endings"), record.fields.get("label")
    if not isinstance(endings, list) or not all(isinstance(ending, str) for ending in endings):
        raise ValueError(f"{record.place}: 'endings' must be a list of texts")
    if not all(ending.strip() for ending in endings):
        raise EmptyField(record.place, "'endings' has an empty text")
    if not str(label).isdecimal() or int(str(label)) >= len(endings):
        raise ValueError(f"{record.place}: 'label' must be 0 to {len(endings) - 1}, not {label!r}")
    context = record.required_text("ctx")
    if activity := record.text("activity_label"):
        second = record.text("ctx_b") or ""
        first = record.text("ctx_a") or context.removesuffix(second)
        context = f"{activity}: {first} {second.capitalize()}"
    return Question(clean(context), [" " + clean(ending) for ending in endings], int(str(label)))


def clean(text: str) -> str:
    """The text without WikiHow's marks such as [header], as in the Evaluation Harness: a space
    after a mark at the beginning stays."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def read_childrens_books(path: Path) -> list[Question]:
    """The published format: 20 numbered lines of text, and a 21st with XXXXX followed, after tabs,
    by the answer and the candidates joined by |."""
    return list(group_childrens_books(path))


def group_childrens_books(path: Path) -> Iterator[Question]:
    sentences: list[str] = []
    for number, line in numbered_lines(path):
        place = f"{path}, line {number}"
        label, _, rest = line.strip().partition(" ")
        if label != str(len(sentences) + 1):
            raise ValueError(f"{place}: expected sentence {len(sentences) + 1} of 21")
        sentences.append(rest)
        if len(sentences) == 21:
            yield read_gap(sentences, place)
            sentences = []
    if sentences:
        raise ValueError(f"{path} ends after sentence {len(sentences)} of 21")


def read_gap(sentences: Sequence[str], place: str) -> Question:
    text_so_far = " ".join(sentences[:-1])
    query, *fields = [field.strip() for field in sentences[-1].split("\t") if field.strip()]
    candidates = fields[1].split("|") if len(fields) == 2 else []
    if (text_so_far + query).count(BLANK) != 1 or fields[0] not in candidates:
        raise ValueError(
            f"{place}: expected one {BLANK}, the answer and, joined by |, candidates with it"
        )
    before, after = detokenize_penn(f"{text_so_far} {query}").split(BLANK)
    space = " " if before.endswith(" ") else ""
    endings = [f"{space}{candidate}{after}" for candidate in candidates]
    return Question(before.rstrip(), endings, candidates.index(fields[0]))
