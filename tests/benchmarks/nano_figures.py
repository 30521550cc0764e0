"""Measure anew the figures of the READMEs that depend on gpt2-nano's weights.

    python tests/benchmarks/nano_figures.py --books A.txt B.txt C.txt D.txt
    python tests/benchmarks/nano_figures.py --books A.txt ... --sms SMSSpamCollection \
        --pairs FOLDER --tasks FOLDER --authors AUTHORS.tsv       # all: hours on two cores
    python tests/benchmarks/nano_figures.py --only finetune samples

It runs the commands of the READMEs one after another, each into a folder of its own under --out,
and prints a table of what their summaries say, and the commands of the figures that it leaves to
you. A command whose folder is complete is not run again, so the script can be stopped and started.
What needs data that no flag names is left out, and said to be. Five samples, of the seeds 0 to 4,
go to samples.md.

--pairs: a folder with Anthropic's helpful-rejection-sampled.test.jsonl and
helpful-base.test.jsonl; --tasks: the folder of `gpt2mini evaluate --data`.
"""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from gpt2mini import GPT2, Tokenizer, complete

PROMPT = "The old man looked at the sea"
TASKS = ["lambada", "wikitext-2", "wikitext-103", "hellaswag"]
BOOKS = Path(__file__).with_name("bits_per_byte.py")
PAIRS = ["--data", "{pairs}/helpful-rejection-sampled.test.jsonl"]
PAIRS += ["--held-out", "{pairs}/helpful-base.test.jsonl", "--fraction", "0.5", "--epochs", "1"]


@dataclass(frozen=True)
class Job:
    """A command, and which figures of its summary.json are shown: names and dotted paths. {books}
    and the like stand for what the flags name."""

    command: list[str]
    figures: dict[str, str]


def classify(data: str, method: str, *more: str) -> Job:
    command = ["classify", "--data", data, *more, "--epochs", "3", "--method", method]
    return Job(command, {"accuracy": "test_accuracy"})


def align(method: str, *more: str) -> Job:
    return Job(
        ["align", "--method", method, *more],
        {
            "reward before": "mean_before",
            "reward after": "mean_after",
            "95 % interval of the difference": "difference_interval",
            "seconds": "seconds",
        },
    )


HELD_OUT = {"accuracy": "held_out_accuracy", "95 % interval": "held_out_accuracy_interval"}
HELD_OUT |= {"loss": "held_out_loss"}
JOBS = {
    "finetune": Job(
        ["finetune"],
        {"perplexity before": "perplexity_before", "after": "perplexity_after", "s": "seconds"},
    ),
    "ppo": align("ppo"),
    "grpo": align("grpo"),
    "sms-full": classify("{sms}", "full", "--balance"),
    "sms-lora": classify("{sms}", "lora", "--balance"),
    "sms-last-block": classify("{sms}", "last-blocks", "--balance"),
    "authors-full": classify("{authors}", "full"),
    "authors-lora": classify("{authors}", "lora"),
    "authors-last-block": classify("{authors}", "last-blocks"),
    "reward": Job(
        ["align", "--method", "reward", *PAIRS, "--held-out-pairs", "500", "--longest", "192"],
        HELD_OUT,
    ),
    "dpo": Job(
        ["align", "--method", "dpo", *PAIRS, "--held-out-pairs", "400", "--longest", "160"],
        HELD_OUT,
    ),
    "zero-shot": Job(
        ["evaluate", "--data", "{tasks}", "--stride", "256", "--tasks", *TASKS],
        {"table": "rows"},
    ),
}

OTHERS = """
Not measured here, and to be written down by hand:
  README.md, the front page:        python examples/finetune_text.py; the twelve lines under it
  the docstrings of examples/*.py:  python examples/NAME.py
  the share of accepted drafts:     python tests/benchmarks/speculative.py
  what rounding costs:              python tests/benchmarks/bits_per_byte.py --quantize int8 BOOK
  speed of a classifier:            python tests/benchmarks/classification.py --model gpt2-nano
  the card:                         python -m gpt2mini verify weights/gpt2-nano --write-card
"""


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if "bits-per-byte" in args.only:
        bits_per_byte(args)
    if "samples" in args.only:
        write_samples(args)
    print("| what | figure | measured |\n|---|---|---|")
    for name in [name for name in JOBS if name in args.only]:
        if (summary := run(name, args)) is not None:
            for figure, path in JOBS[name].figures.items():
                print(f"| {name} | {figure} | {shown(value_at(summary, path))} |", flush=True)
    print(OTHERS)


def run(name: str, args: argparse.Namespace) -> dict | None:
    """The job's summary; None where its data are not named. A job is run once for a folder."""
    out = args.out / name
    given = {key: str(value) for key, value in vars(args).items() if value is not None}
    wanted = set(re.findall(r"{(\w+)}", " ".join(JOBS[name].command)))
    if missing := wanted - given.keys():
        print(f"| {name} | left out: needs --{' --'.join(sorted(missing))} | |", flush=True)
        return None
    if not (out / "summary.json").is_file():
        command = [part.format(**given) for part in JOBS[name].command]
        flags = ["--model", args.model, "--out", str(out)]
        with (args.out / f"{name}.log").open("w", encoding="utf-8") as log:
            subprocess.run(
                [sys.executable, "-m", "gpt2mini", *command, *flags],
                check=True,
                stdout=log,
                stderr=log,
            )
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


def value_at(summary: dict, path: str) -> object:
    return reduce(lambda found, key: found[key], path.split("."), summary)


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and all(isinstance(one, float) for one in value):
        return " to ".join(shown(one) for one in value)
    if isinstance(value, list):
        return "; ".join(f"{row['task']} {row['metric']} {shown(row['value'])}" for row in value)
    return str(value)


def bits_per_byte(args: argparse.Namespace) -> None:
    if not args.books:
        print("bits per byte: left out, needs --books")
        return
    flags = ["--model", args.model, "--characters", "100000", *map(str, args.books)]
    subprocess.run([sys.executable, str(BOOKS), *flags], check=True)


def write_samples(args: argparse.Namespace) -> None:
    model, tokenizer = GPT2.from_pretrained(args.model), Tokenizer.from_pretrained(args.model)
    texts = [
        f"## Seed {seed}\n\n{complete(model, tokenizer, PROMPT, 120, top_p=0.9, generator=seed)}\n"
        for seed in range(5)
    ]
    path = args.out / "samples.md"
    path.write_text("\n".join(["# Five samples, top-p 0.9\n", *texts]), encoding="utf-8")
    print(f"samples: {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["bits-per-byte", "samples", *JOBS]
    parser.add_argument("--model", default="gpt2-nano")
    parser.add_argument("--out", type=Path, default=Path("runs/nano-figures"))
    parser.add_argument("--only", nargs="+", default=names, choices=names, help="default: all")
    parser.add_argument("--books", nargs="+", type=Path, help="texts that were held out")
    parser.add_argument("--sms", type=Path, help="the SMS spam collection")
    parser.add_argument("--authors", type=Path, help="paragraphs and their authors, .tsv")
    parser.add_argument("--pairs", type=Path, help="folder of the HH pairs")
    parser.add_argument("--tasks", type=Path, help="folder of the zero-shot tasks")
    return parser.parse_args()


if __name__ == "__main__":
    main()
