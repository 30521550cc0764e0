"""Measure a model: the GPT-2 paper's zero-shot table, perplexity, and how it writes.

    python examples/evaluate.py                              # a minute: sample prose, own writing
    python examples/evaluate.py --tasks text=novel.txt --stride 128
    python examples/evaluate.py --model gpt2 --tasks lambada wikitext-2 hellaswag
    python examples/evaluate.py --model gpt2 --tasks lambada=lambada_test.jsonl --limit 100

A task is given with its file, task=path, or found in the folder --data under its usual name;
without either, lambada, wikitext-2, hellaswag, enwik8 and text8 are downloaded once. Each figure
stands beside the paper's for the four sizes, with the setting used. Prints one table and writes
summary.json to --out.
"""

import argparse
from pathlib import Path

import torch
from flags import GENERAL_TEXT, common_flags, positive, run, write_summary

from gpt2mini import GPT2, Tokenizer
from gpt2mini.device import pick_device
from gpt2mini.evaluation import generation_quality, zero_shot
from gpt2mini.evaluation.task_files import find_task_file
from gpt2mini.evaluation.zero_shot import TASKS
from gpt2mini.files import writable_folder
from gpt2mini.generation import generate

SOURCES = """where the files of the tasks come from:
  lambada            https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl
  lambada-original   https://zenodo.org/record/2630551 (lambada_test_plain_text.txt)
  wikitext-2, -103   the tokenized files with <unk>: Merity et al. 2016
  enwik8, text8      http://mattmahoney.net/dc/textdata.html (the usual test part: the last 5 MB)
  cbt-cn, cbt-ne     the Children's Book Test: Hill et al. 2016 (the paper's are the valid files)
  hellaswag          JSONL with ctx, endings, label: https://github.com/rowanz/hellaswag
  text               any UTF-8 file: text=path"""


def main() -> None:
    args = parse_arguments()
    out = writable_folder(args.out)
    tasks = {"text": GENERAL_TEXT} if not args.tasks else find_files(args.tasks, args.data)
    device = pick_device(args.device)
    tokenizer = Tokenizer.from_pretrained(args.model)
    model = GPT2.from_pretrained(args.model, device=device)
    table = zero_shot(
        model,
        tokenizer,
        tasks,
        args.context_length,
        args.stride,
        args.limit,
        args.batch_size,
        args.dtype,
        progress=True,
    )
    print(f"\n{args.model} on {device}\n\n{table}")
    summary = {"model": str(args.model), "dtype": args.dtype, "rows": table.as_dicts()}
    if not args.tasks:
        texts = write_texts(model, tokenizer, args)
        if texts:
            quality = generation_quality(model, tokenizer, texts, args.dtype)
            print(f"\nits own writing ({len(texts)} texts, temperature 1), the first begins:")
            print(f"{texts[0][:200]!r}\n{quality}\n\n{SOURCES}\n")
            summary |= {"generation": quality.as_dict(), "texts": texts}
        else:
            print("\nits own writing: no text of two tokens or more, so there is nothing to score")
    write_summary(out, summary)
    print(f"JSON: {out / 'summary.json'}")


def find_files(tasks: list[str], folder: str | None) -> dict[str, Path]:
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


def write_texts(model: GPT2, tokenizer: Tokenizer, args: argparse.Namespace) -> list[str]:
    """Texts that the model writes from nothing, all at once, each up to its <|endoftext|>."""
    device = model.tok_emb.weight.device
    written = generate(
        model,
        torch.tensor([[tokenizer.eos_id]], device=device),
        args.sample_tokens,
        num_samples=args.samples,
        generator=torch.Generator(device).manual_seed(args.seed),
        overflow="slide",
    )
    rows = written.token_ids[:, 1:].tolist()
    ends = [row.index(tokenizer.eos_id) if tokenizer.eos_id in row else len(row) for row in rows]
    texts = [tokenizer.decode(row[:end]) for row, end in zip(rows, ends, strict=True)]
    return [text for text in texts if len(tokenizer.encode(text)) > 1]


def parse_arguments() -> argparse.Namespace:
    parser = common_flags(__doc__, out="runs/evaluate")
    parser.epilog = SOURCES
    parser.add_argument("--model", default="gpt2-nano", help="folder or name (default gpt2-nano)")
    parser.add_argument(
        "--tasks", nargs="+", help=f"task=path, or a task in --data; tasks: {', '.join(TASKS)}"
    )
    parser.add_argument(
        "--data", help="a folder with the tasks' files under their usual names; default: download"
    )
    parser.add_argument(
        "--limit",
        type=positive,
        help="so many examples of a task, or thousand characters of a text",
    )
    parser.add_argument("--context-length", type=int, help="default: all that the model can read")
    parser.add_argument("--stride", type=int, help="default: half of the context")
    parser.add_argument(
        "--batch-size", type=positive, default=8, help="windows at once (default 8)"
    )
    parser.add_argument("--samples", type=positive, default=4, help="texts to write (default 4)")
    parser.add_argument("--sample-tokens", type=positive, default=120, help="their length, at most")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
