"""What all examples share: one vocabulary of flags, and errors without a traceback."""

import argparse
import math
import os
import random
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from gpt2mini import GPT2, Tokenizer, generate
from gpt2mini.data.instructions import TEMPLATES
from gpt2mini.data.samples import sample
from gpt2mini.files import writable_folder, write_json
from gpt2mini.training.checkpoints import RunCheckpoints
from gpt2mini.training.distributed import get_rank, process_group, shard
from gpt2mini.training.run import only_run_in
from gpt2mini.training.signals import TrainingStopped

SAMPLE_TEXT = sample("sample.txt")
SAMPLE_EXCHANGES = sample("keeper.jsonl")
GENERAL_TEXT = sample("general.txt")  # letters, a recipe, news, a dialogue


SMALL = 50_000_000  # parameters; larger models want smaller steps


def common_flags(
    description: str | None, out: str | None = None, dtype: bool = True
) -> argparse.ArgumentParser:
    """A parser with the flags of every example; scripts that write pass a default for --out, and
    dtype=False if they compute in the weights' own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seed", type=seed_number, default=0, help="same seed, same result (default 0)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    if out is not None:
        add("--out", default=out, help=f"folder for results (default {out})")
    if out is not None and dtype:
        add(
            "--dtype",
            default="auto",
            choices=["auto", "fp32", "bf16", "fp16"],
            help="of matrix products; auto: the best that the device gains from (default auto)",
        )
    return parser


def flag_type(
    kind: Callable[[str], Any], accepts: Callable[[float], bool], words: str
) -> Callable[[str], Any]:
    """The type of a flag that takes some numbers only; words: which."""

    def parse(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan  # which no comparison accepts
        if not accepts(number):
            raise argparse.ArgumentTypeError(f"must be {words}, not {text!r}")
        return number

    return parse


positive = flag_type(int, lambda n: n >= 1, "a whole number of at least 1")
not_negative = flag_type(int, lambda n: n >= 0, "a whole number of at least 0")
seed_number = flag_type(int, lambda n: 0 <= n < 2**64, "a whole number from 0 to 2**64 - 1")
not_negative_number = flag_type(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
multiple = flag_type(float, lambda x: x == 0 or 1 < x < math.inf, "0 or a number above 1")
positive_number = flag_type(float, lambda x: 0 < x < math.inf, "a number above 0")
share = flag_type(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
below_half = flag_type(float, lambda x: 0 <= x < 0.5, "a number from 0 to below 0.5")


def training_flags(description: str | None, out: str) -> argparse.ArgumentParser:
    """`common_flags`, and what keeps a long run from being lost."""
    parser = common_flags(description, out)
    add = parser.add_argument
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, if any")
    add(
        "--save-every",
        type=not_negative,
        default=0,
        help="steps between checkpoints (default 0: none)",
    )
    add("--keep-last", type=positive, default=2, help="checkpoints to keep (default 2)")
    add(
        "--on-bad-step",
        choices=["stop", "skip"],
        default="stop",
        help="if the loss is no longer a number or leaps (default stop)",
    )
    add(
        "--activation-checkpointing", action="store_true", help="far less memory, a third more time"
    )
    add("--compile", action="store_true", help="compile the blocks first (needs a C++ compiler)")
    add(
        "--spike",
        type=multiple,
        default=0.0,
        help="a leap: so many times the usual loss (default 0: none is)",
    )
    return parser


def run_folder(args: argparse.Namespace) -> Path:
    """The folder `--out`, writable, and free: no run is at work in it, and none has left
    checkpoints unless it is to be resumed. To be asked before anything is written into it."""
    out = writable_folder(args.out)
    for flag in ("model", "init_from"):
        check_not_replaced(flag, getattr(args, flag, None), out)
    with only_run_in(out):
        if not args.resume:
            RunCheckpoints(out / "checkpoints").check_there_are_none()
    return out


def check_not_replaced(flag: str, model: str | None, out: Path) -> None:
    """Raise ValueError for a model to start from that lies where the run would save its own."""
    if model and Path(model).exists() and Path(model).resolve().is_relative_to(out.resolve()):
        name = flag.replace("_", "-")
        raise ValueError(
            f"--{name} {model} lies in --out {out}, where the tuned model would take its place: "
            "choose another --out"
        )


def keeping(args: argparse.Namespace) -> dict[str, Any]:
    """What `training_flags` asks of the loop's settings."""
    return {
        "save_every": args.save_every,
        "keep_last": args.keep_last,
        "on_bad_step": args.on_bad_step,
        "spike": args.spike,
        "activation_checkpointing": args.activation_checkpointing,
        "compile": args.compile,
    }


def sharding_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard", action="store_true", help="spread the model over torchrun's processes (FSDP2)"
    )


def shard_if_asked(args: argparse.Namespace, model: GPT2) -> None:
    """What `sharding_flag` asks; make optimizers afterwards, for they hold parameters."""
    if args.shard:
        shard(model, args.dtype)


def record_flags(parser: argparse.ArgumentParser, data: str | Path, held_out: float) -> None:
    """Where records of several fields come from; for `read_and_split`."""
    add = parser.add_argument
    add("--data", default=data, help=".jsonl, .json, .csv or hf:owner/name:split")
    add("--columns", help="fields called otherwise: ours=theirs,ours=theirs")
    add("--template", default="plain", help=f"{', '.join(TEMPLATES)}, or your own with {{prompt}}")
    add("--fraction", type=float, default=1.0, help="seeded share of the data")
    add("--validation-share", type=float, default=held_out, help=f"held out (default {held_out:g})")


def read_and_split(
    args: argparse.Namespace, read: Callable[[str, str, dict[str, str]], list[Any]]
) -> tuple[list[Any], list[Any]]:
    """(to learn from, held out): the records that `record_flags` name."""
    records = read(args.data, template_of(args), parse_columns(args.columns))
    return split_seeded(records, args.fraction, args.validation_share, args.seed)


def template_of(args: argparse.Namespace) -> str:
    return TEMPLATES.get(args.template, args.template)


def is_small(model: GPT2) -> bool:
    return sum(parameter.numel() for parameter in model.parameters()) < SMALL


def run(main: Callable[[], None]) -> None:
    """Run a script's main, in one process or in those of torchrun, of which only the first speaks;
    what the user can mend is said in one line."""
    first = int(os.environ.get("RANK", 0)) == 0  # of the processes of torchrun
    try:
        with process_group(), redirect_stdout(sys.stdout if first else None):
            main()
    except TrainingStopped as stopped:
        if first:
            print(f"\n{stopped}\nto go on: the same command with --resume", file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
    except BrokenPipeError:  # nobody reads on, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError, ImportError, FloatingPointError, NotImplementedError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")


def exit_unless_rank_zero() -> None:
    """After training in several processes, one is enough to look at the result."""
    if get_rank() > 0:
        sys.exit()


def draw_losses(out: Path, title: str, unit: str = "nats per token") -> None:
    """Draw `out`/loss.png if matplotlib is installed; otherwise say how to get it."""
    from gpt2mini.inspection import plot_losses

    try:
        plot_losses(out / "metrics.jsonl", out / "loss.png", title, unit)
    except ImportError as error:
        print(f"(no loss curve: {error})")
    else:
        print(f"loss curve: {out / 'loss.png'}")


def report_forgetting(
    base: GPT2 | None, tuned: GPT2, tokenizer: Tokenizer, new_text: str
) -> dict[str, Any]:
    """Print what tuning has changed on general prose and on held-out text; a dict for the summary.

    base: the model before; None for a model with LoRA. Only the beginning of a long text is read:
    this is a glance, not a test.
    """
    from gpt2mini.evaluation import forgetting

    general = GENERAL_TEXT.read_text(encoding="utf-8")
    found = forgetting(base, tuned, tokenizer, general, new_text[:20_000])
    print(f"\nwhat has it forgotten? (general text: {GENERAL_TEXT.name})\n{found}\n")
    return found.as_dict()


def shorten(documents: list[range], tokens: int) -> list[range]:
    """The first part of each document, `tokens` in all at the most."""
    most = max(2, tokens // len(documents))
    return [document[:most] for document in documents]


def write_summary(out: Path, summary: dict[str, Any]) -> None:
    write_json(out / "summary.json", summary)


def parse_columns(columns: str | None) -> dict[str, str]:
    """prompt=question,completion=answer -> what our names are called in the data."""
    pairs = [pair.split("=") for pair in columns.split(",")] if columns else []
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise ValueError(f"--columns must read ours=theirs,ours=theirs, not {columns!r}")
    found = {ours.strip(): theirs.strip() for ours, theirs in pairs}
    if len(found) < len(pairs):
        raise ValueError(f"--columns gives one of our names twice: {columns!r}")
    return found


def split_seeded(
    items: list[Any], fraction: float, validation_share: float, seed: int
) -> tuple[list[Any], list[Any]]:
    """(to learn from, held out): a seeded choice of a share of all, in a seeded order."""
    if not 0 < fraction <= 1 or not 0 < validation_share < 1:
        raise ValueError("--fraction must lie in (0, 1] and --validation-share in (0, 1)")
    if len(items) < 2:
        raise ValueError("one record is too few: at least one to learn from and one to hold out")
    shuffled = random.Random(seed).sample(items, max(2, round(fraction * len(items))))
    n_held_out = max(1, round(validation_share * len(shuffled)))
    if n_held_out == len(shuffled):
        raise ValueError(
            f"--validation-share {validation_share:g} of {len(shuffled)} records holds out all of "
            "them, and leaves none to learn from"
        )
    return shuffled[n_held_out:], shuffled[:n_held_out]


def answer(
    model: GPT2, tokenizer: Tokenizer, prompt: str, args: argparse.Namespace
) -> tuple[str, bool]:
    """(a seeded answer, whether it ended by itself); a long prompt loses its beginning."""
    context = model.config.context_length
    room = max(context - args.answer_tokens, context // 2)  # of which sliding would leave as much
    token_ids = torch.tensor([tokenizer.encode(prompt)[-room:]], device=model.tok_emb.weight.device)
    found = generate(
        model,
        token_ids,
        args.answer_tokens,
        temperature=0.7,
        top_k=50,
        stop_ids=[tokenizer.eos_id],
        generator=torch.Generator(token_ids.device).manual_seed(args.seed),
        overflow="slide",
    )
    ids = found.token_ids[0, token_ids.shape[1] :].tolist()
    ended = ids[-1] == tokenizer.eos_id
    return tokenizer.decode(ids[:-1] if ended else ids).strip(), ended


def print_answers(
    prompts: list[str], before: list[tuple[str, bool]], after: list[tuple[str, bool]]
) -> None:
    for prompt, (first, _), (second, ended) in zip(prompts, before, after, strict=True):
        print(f"\n--- {prompt}\n[before] {first}\n[after]  {second}{'' if ended else ' ...'}")
    print()
