"""Measure a model: the GPT-2 paper's zero-shot table, perplexity, and how it writes.

Examples:
  gpt2mini evaluate                                  # a minute: sample prose, own writing
  gpt2mini evaluate --text novel.txt poems.txt         # in rolling and in sliding windows
  gpt2mini evaluate --adapter runs/finetune/best --text novel.txt
  gpt2mini evaluate --model gpt2 --tasks lambada wikitext-2 hellaswag
  gpt2mini evaluate --model gpt2 --tasks lambada=lambada_test.jsonl --limit 100

A task is given with its file, task=path, or found in the folder --data under its usual name;
without either, lambada, wikitext-2, hellaswag, enwik8 and text8 are downloaded once. Each figure
stands beside the paper's for the four sizes, with the setting used: a long text is read in rolling
windows, as by lm-eval, or with --stride in sliding ones, as in the documentation of transformers.
Prints one table and writes summary.json to --out.

Where the files of the tasks come from:
  lambada            https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl
  lambada-original   https://zenodo.org/record/2630551 (lambada_test_plain_text.txt)
  wikitext-2, -103   the tokenized files with <unk>: Merity et al. 2016
  wikitext-2-raw     wiki.test.raw of wikitext-2-raw-v1.zip, as in the documentation of
                     transformers: https://huggingface.co/datasets/ggml-org/ci
  enwik8, text8      http://mattmahoney.net/dc/textdata.html (the usual test part: the last 5 MB)
  cbt-cn, cbt-ne     the Children's Book Test: Hill et al. 2016 (the paper's are the valid files)
  hellaswag          JSONL with ctx, endings, label: https://github.com/rowanz/hellaswag
  text               any file of text: text=path
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpt2mini import GPT2, Tokenizer
from gpt2mini.cli import common, models, options
from gpt2mini.data.samples import sample
from gpt2mini.device import pick_device
from gpt2mini.evaluation import generation_quality, zero_shot
from gpt2mini.evaluation.running_text import check_text_file
from gpt2mini.evaluation.table import Table
from gpt2mini.evaluation.task_files import find_task_file
from gpt2mini.evaluation.windows import check_window
from gpt2mini.evaluation.zero_shot import TASKS
from gpt2mini.files import writable_folder
from gpt2mini.preferences.comparison import answer_prompts

OWN_WRITING = "evaluation without --tasks and --text"


@dataclass(frozen=True)
class WritingFlags:
    """Without --tasks and --text: the model's own writing, which is judged too."""

    samples: options.Count = 4  # texts to write
    max_new_tokens: options.Count = 120  # their length, at most


@dataclass(frozen=True)
class Flags:
    model: str = "gpt2-nano"  # a model's folder or name
    adapter: str | None = None  # folder of an adapter that was trained on --model
    # files whose perplexity is measured in both kinds of windows (sliding: by half, or --stride)
    text: options.Several = ()
    tasks: options.Several = ()  # task=path, or a task in --data; none: prose and own writing
    data: str | None = None  # a folder with the tasks' files under their usual names
    out: str = "runs/evaluate"  # folder for results
    limit: options.OptionalCount = (
        None  # so many examples of a task, or thousand characters of a text
    )
    context_length: int | None = None  # None: all that the model can read
    stride: int | None = None  # of sliding windows; None: rolling windows, as lm-eval's
    batch_size: options.Count = 8  # windows at once
    writing: WritingFlags = options.group(WritingFlags, OWN_WRITING)
    machine: options.Machine = options.group(options.Machine)

    @property
    def conditions(self) -> set[str]:
        return set() if self.tasks or self.text else {OWN_WRITING}


def run(flags: Flags) -> None:
    if flags.data and all("=" in task for task in options.flat(flags.tasks)):
        raise ValueError("--data is for tasks without a file: name one, as in --tasks lambada")
    out = writable_folder(flags.out)
    tasks, texts = find_files(options.flat(flags.tasks), flags.data), options.flat(flags.text)
    for text in texts:
        check_text_file(Path(text))
    usual = {} if tasks or texts else {"text": sample("general.txt")}
    device = pick_device(flags.machine.device)
    model, tokenizer = models.load(flags.model, flags.adapter, device)
    evaluate = partial(
        zero_shot,
        *(model, tokenizer),
        context_length=flags.context_length,
        limit=flags.limit,
        batch_size=flags.batch_size,
        precision=flags.machine.dtype,
        progress=True,
    )
    sliding = flags.stride or max(1, (flags.context_length or model.config.context_length) // 2)
    if texts:
        check_window(model, flags.context_length, sliding)
    rows = evaluate(tasks=tasks or usual, stride=flags.stride).rows
    for text in texts:
        for stride in (None, sliding):
            rows += evaluate(tasks={"text": text}, stride=stride).rows
    table = Table(rows)
    print(f"\n{models.describe(flags.model, flags.adapter)} on {device}\n\n{table}")
    summary = {"dtype": flags.machine.dtype, "rows": table.as_dicts()}
    if usual:
        summary |= judge_own_writing(model, tokenizer, flags)
    common.write_summary(out, flags, summary)


def find_files(tasks: Sequence[str], folder: str | None) -> dict[str, Path]:
    """Each task's file: given as task=path, in the folder, or downloaded."""
    found: dict[str, Path] = {}
    for task in tasks:
        name, equals, path = task.partition("=")
        if name not in TASKS:
            raise ValueError(f"there is no task {name!r}: choose among {', '.join(TASKS)}")
        if name in found:
            raise ValueError(f"the task {name} is given twice: evaluate one file at a time")
        found[name] = Path(path) if equals else find_task_file(name, folder)
    return found


def judge_own_writing(model: GPT2, tokenizer: Tokenizer, flags: Flags) -> dict[str, Any]:
    """Of texts that it writes from nothing but <|endoftext|>, which an empty prompt stands for."""
    written = answer_prompts(
        *(model, tokenizer, [""]),
        min(flags.writing.max_new_tokens, model.config.context_length - 1),
        flags.writing.samples,
        torch.Generator(model.tok_emb.weight.device).manual_seed(flags.machine.seed),
    )
    texts = [text for text in written if len(tokenizer.encode(text)) > 1]
    if not texts:
        print("\nits own writing: no text of two tokens or more, so there is nothing to score")
        return {}
    quality = generation_quality(model, tokenizer, texts, flags.machine.dtype)
    print(f"\nits own writing ({len(texts)} texts, temperature 1), the first begins:")
    print(f"{texts[0][:200]!r}\n{quality}\n\ntasks of the GPT-2 paper: gpt2mini evaluate --help\n")
    return {"generation": quality.as_dict(), "texts": texts}
