"""The GPT-2 paper's zero-shot table (Radford et al. 2019, table 3)."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from gpt2mini.checks import check_predicts_tokens
from gpt2mini.evaluation.lambada import lambada
from gpt2mini.evaluation.multiple_choice import childrens_books, hellaswag
from gpt2mini.evaluation.running_text import any_text, bits, wikitext, wikitext_raw
from gpt2mini.evaluation.table import Options, Row, Table
from gpt2mini.evaluation.windows import check_window
from gpt2mini.model import GPT2
from gpt2mini.tokenizer import Tokenizer

TASKS: dict[str, Callable[[GPT2, Tokenizer, Path, Options], list[Row]]] = {
    "lambada": lambada,  # OpenAI's .jsonl
    "lambada-original": lambada,  # one passage a line
    "wikitext-2": partial(wikitext, task="WikiText-2"),
    "wikitext-2-raw": partial(wikitext_raw, task="WikiText-2, raw"),
    "wikitext-103": partial(wikitext, task="WikiText-103"),
    "enwik8": partial(bits, task="enwik8"),
    "text8": partial(bits, task="text8"),
    "cbt-cn": partial(childrens_books, task="CBT-CN"),  # common nouns
    "cbt-ne": partial(childrens_books, task="CBT-NE"),  # named entities
    "hellaswag": hellaswag,
    "text": any_text,
}


def zero_shot(
    model: GPT2,
    tokenizer: Tokenizer,
    tasks: Mapping[str, str | Path],
    context_length: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    precision: str = "fp32",
    progress: bool = False,
) -> Table:
    """A table of results with the paper's figures.

    tasks: names in TASKS and their files, {"lambada": "lambada_test.jsonl", ...}. context_length
    and stride: as for `perplexity`, for tasks on long texts; each row says which it used. limit:
    number of examples of each task, or thousands of characters of a long text, for a quick test.
    Raises ValueError for an unknown task or an invalid setting, and FileNotFoundError for a missing
    file, before the first task starts; ValueError, with the line, for a file not in the format of
    its task.
    """
    check_predicts_tokens(model)
    check_window(model, context_length, stride)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    for name, file in tasks.items():
        if name not in TASKS:
            raise ValueError(f"there is no task {name!r}: choose among {', '.join(TASKS)}")
        if not Path(file).is_file():
            raise FileNotFoundError(f"there is no file {file} for the task {name}")
    options = Options(context_length, stride, limit, batch_size, precision, progress)
    return Table(
        [
            row
            for name, file in tasks.items()
            for row in TASKS[name](model, tokenizer, Path(file), options)
        ]
    )
