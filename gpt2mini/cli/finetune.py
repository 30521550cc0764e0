"""Train a model on plain text, or on prompts and completions, and read it before and after.

Examples:
  gpt2mini finetune                                        # a minute, on a bundled story
  gpt2mini finetune --data novel.txt --epochs 3
  gpt2mini finetune --model gpt2 --data books/ --fraction 0.01
  gpt2mini finetune --data answers.jsonl --template alpaca --method lora
  gpt2mini finetune --data hf:owner/name:train --columns prompt=question

The data are a text file or a folder of .txt files; or records: .jsonl, .json, .csv or hf:. Of
records the loss counts the completion and the <|endoftext|> behind it, so that the tuned model
stops by itself. Prints continuations before and after, the loss on data held out, and what the
model has forgotten of general prose. Writes metrics.jsonl, summary.json, loss.png and best/, the
model or adapter with the lowest validation loss, to --out.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from gpt2mini import GPT2, Tokenizer
from gpt2mini.cli.common import (
    answer,
    choose_what_learns,
    draw_losses,
    exit_unless_rank_zero,
    how_many_learn,
    how_to_save,
    is_small,
    load_best,
    print_answers,
    print_rows,
    report_forgetting,
    run_folder,
    write_summary,
)
from gpt2mini.cli.data import RECORDS, RecordFlags, holds_records, shorten, split_seeded
from gpt2mini.cli.flags import (
    Count,
    CountOrZero,
    LastBlocks,
    LoRAFlags,
    Machine,
    OptionalCount,
    OptionalNotNegative,
    OptionalPositive,
    Positive,
    RunFlags,
    Sharding,
    only_for,
)
from gpt2mini.data.corpus import hold_out, text_files, tokenize_files
from gpt2mini.data.instructions import ExchangeBatches, encode_exchanges, read_exchanges
from gpt2mini.data.samples import sample
from gpt2mini.data.text import Batch, TokenBatches, sequential_batches
from gpt2mini.device import pick_device
from gpt2mini.training import adamw, evaluate_loss, train
from gpt2mini.training.distributed import get_world_size, rank_zero_first

PEAK_RATES = {"full": 5e-5, "last-blocks": 2e-4, "lora": 2e-4}  # small models take ten times these
TEXT = "plain text"
OUTSIDE = ["It was a dark and stormy night, and", "My dear Mrs. Brown,\n\nI have been"]


@dataclass(frozen=True)
class TextFlags:
    """With plain text."""

    sequence_length: Count = 256  # tokens per window
    validation_tokens: Count = 65536  # of the text held out, so many are scored
    prompt: str | None = None  # what is continued before and after; None: the first words held out


@dataclass(frozen=True)
class ExchangeFlags(RecordFlags):
    """With records: prompt and completion; instruction, input and output; or dialogues in "chosen",
    whose last answer is learned."""

    longest: Count = 512  # tokens per row, at most
    train_on: Literal["completion", "all"] = "completion"  # all: the prompt too
    packing: bool = True  # short records share rows, and none sees another
    answers: CountOrZero = 3  # held-out prompts to answer before and after


@dataclass(frozen=True)
class Flags:
    model: str = "gpt2-nano"  # a model's folder or name
    data: str = str(sample("sample.txt"))  # a text file, a folder of .txt files, or records
    out: str = "runs/finetune"  # folder for results
    method: Literal["full", "last-blocks", "lora"] = "full"  # what learns
    fraction: float = 1.0  # seeded share of the data to use
    validation_share: float = 0.1  # share that is held out
    epochs: Positive = 5.0  # times through the data
    steps: OptionalCount = None  # optimizer steps; overrides --epochs
    batch_size: OptionalCount = None  # rows per micro-batch; None: 4 windows, or 1 row of records
    accumulate: Count = 1  # micro-batches per step
    lr: OptionalPositive = None  # peak learning rate; None: by method and size
    weight_decay: OptionalNotNegative = None  # of matrices; None: 0.1, of adapters 0
    max_new_tokens: Count = 80  # length of the continuations before and after
    text: TextFlags = field(default_factory=TextFlags, metadata=only_for(TEXT))
    records: ExchangeFlags = field(default_factory=ExchangeFlags, metadata=only_for(RECORDS))
    blocks: LastBlocks = field(
        default_factory=LastBlocks, metadata=only_for("--method last-blocks")
    )
    lora: LoRAFlags = field(default_factory=LoRAFlags, metadata=only_for("--method lora"))
    run: RunFlags = field(default_factory=RunFlags)
    parallel: Sharding = field(default_factory=Sharding)
    machine: Machine = field(default_factory=Machine)

    @property
    def conditions(self) -> set[str]:
        return {f"--method {self.method}", RECORDS if holds_records(self.data) else TEXT}


def run(flags: Flags) -> None:
    out = run_folder(flags.out, flags.run.resume, flags.model)
    seed, precision = flags.machine.seed, flags.machine.dtype
    torch.manual_seed(seed)
    device = pick_device(flags.machine.device)
    tokenizer = Tokenizer.from_pretrained(flags.model)
    model = GPT2.from_pretrained(flags.model, device=device)
    read = read_records if holds_records(flags.data) else read_text
    data = read(flags, out, tokenizer, model.config.context_length)
    choose_what_learns(model, flags.method, flags.blocks, flags.lora)
    learning, total = how_many_learn(model)
    per_step = flags.accumulate * get_world_size()
    steps = flags.steps or math.ceil(flags.epochs * data.batches.batches_per_epoch / per_step)
    print(f"{data.description}\n{steps} steps of {per_step} batches on {device}")
    print(f"{learning:,} of {total:,} parameters learn: {learning / total:.2%} ({flags.method})")

    prompts = data.prompts + data.outside
    before = answer(model, tokenizer, prompts, flags.max_new_tokens, seed)
    save, began = how_to_save(model), time.perf_counter()
    flags.parallel.apply(model, precision)
    decay = 0.0 if flags.method == "lora" else 0.1
    optimizer = adamw(
        model,
        lr=flags.lr or PEAK_RATES[flags.method] * (10 if is_small(model) else 1),
        weight_decay=decay if flags.weight_decay is None else flags.weight_decay,
    )
    rows = train(
        model,
        data.batches,
        [optimizer],
        flags.run.settings(steps, precision, accumulate=flags.accumulate),
        evaluate=lambda: evaluate_loss(model, data.validation(), precision=precision),
        out=out,
        save=save,
        resume=flags.run.resume,
    )
    exit_unless_rank_zero()
    seconds = time.perf_counter() - began

    if flags.method != "lora":
        tokenizer.save_pretrained(out / "best")
    tuned = load_best(flags.model, out, device)
    after = answer(tuned, tokenizer, prompts, flags.max_new_tokens, seed)
    print_rows(rows, ["loss", "validation_loss"], where="validation_loss")
    n = len(data.prompts)
    print_answers(prompts[:n], before[:n], after[:n])
    if data.outside:
        print("=== outside the format: what has the tuning left alone?")
        print_answers(prompts[n:], before[n:], after[n:])
    losses = report_losses(rows)
    forgotten = report_forgetting(flags.model, tuned, tokenizer, data.held_out_text)
    summary = {
        "steps": rows[-1]["step"],
        "seconds": round(seconds, 1),
        "trainable_parameters": learning,
        "trainable_share": learning / total,
        **losses,
        **data.summary,
        "forgetting": forgotten,
        "prompts": prompts,
        "answers_before": before,
        "answers_after": after,
    }
    write_summary(out, flags, summary)
    title = f"Fine-tuning {flags.model} on {Path(flags.data).name}"
    draw_losses(out, title, "nats per token")
    report_best(flags, out)


def report_losses(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Print the validation loss before and at its lowest; the figures for the summary."""
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    first, best = losses[0], min(losses)
    print(
        f"validation loss {first:.3f} -> {best:.3f} nats per token "
        f"(perplexity {math.exp(first):.1f} -> {math.exp(best):.1f})"
    )
    if not losses[-1] <= best + 0.01:  # nor is NaN
        print(f"(it had risen again to {losses[-1]:.3f} at the end: fewer epochs would do)")
    return {
        "validation_loss_before": first,
        "validation_loss_after": best,
        "perplexity_before": math.exp(first),
        "perplexity_after": math.exp(best),
    }


def report_best(flags: Flags, out: Path) -> None:
    best = out / "best"
    if flags.method == "lora":
        size = sum(file.stat().st_size for file in best.iterdir())
        print(f"adapter: {best}, {size / 1e6:.2f} MB, in PEFT's format")
        print(f"  gpt2mini generate --model {flags.model} --adapter {best}")
    else:
        print(f"tuned model: {best}   (gpt2mini generate --model {best})")


# ---- the data


@dataclass(frozen=True)
class Data:
    """Plain text or records, ready to be learned."""

    batches: TokenBatches | ExchangeBatches
    validation: Callable[[], Iterable[Batch]]
    description: str
    prompts: list[str]
    outside: list[str]  # prompts of another kind
    held_out_text: str
    summary: dict[str, Any]


def read_text(flags: Flags, out: Path, tokenizer: Tokenizer, context_length: int) -> Data:
    """Windows of consecutive tokens."""
    seed, size = flags.machine.seed, flags.batch_size or 4
    with rank_zero_first():
        corpus = tokenize_files(text_files(flags.data), tokenizer, out / "tokens")
    documents = corpus.documents(flags.fraction, seed)
    training, held_out = hold_out(documents, flags.validation_share, seed)
    window = min(flags.text.sequence_length, context_length)
    scored = shorten(held_out, flags.text.validation_tokens)
    beginnings = (document[:5000] for document in held_out[:20])
    texts = [tokenizer.decode(corpus.tokens[d.start : d.stop].tolist()) for d in beginnings]
    first_words = tokenizer.decode(corpus.tokens[held_out[0]][:8].tolist())
    return Data(
        batches=TokenBatches(corpus.tokens, training, size, window, seed),
        validation=lambda: sequential_batches(corpus.tokens, scored, size, window),
        description=f"{sum(map(len, training)):,} tokens to learn from, "
        f"{sum(map(len, held_out)):,} held out; batches of {size} x {window} tokens",
        prompts=[flags.text.prompt or first_words],
        outside=[],
        held_out_text="\n\n".join(texts),
        summary={},
    )


def read_records(flags: Flags, out: Path, tokenizer: Tokenizer, context_length: int) -> Data:
    """Prompts and completions."""
    records, seed = flags.records, flags.machine.seed
    exchanges = records.read(flags.data, read_exchanges)
    parts = split_seeded(exchanges, flags.fraction, flags.validation_share, seed)
    longest = min(records.longest, context_length)
    size = flags.batch_size or (1 if records.packing else 8)
    batches, validation = (
        ExchangeBatches(
            encode_exchanges(part, tokenizer, longest),
            *(size, seed, records.train_on, records.packing, longest),
        )
        for part in parts
    )
    training, held_out = parts
    return Data(
        batches=batches,
        validation=validation.in_order,
        description=f"{len(training)} records to learn from, {len(held_out)} held out; batches of "
        f"{size} of {len(batches.rows)} rows of at most {longest} tokens, of which "
        f"{batches.padding_share:.1%} is padding; the loss counts "
        f"{'completions' if records.train_on == 'completion' else 'prompts and completions'}",
        prompts=[one.prompt for one in held_out[: records.answers]],
        outside=OUTSIDE,
        held_out_text="\n\n".join(one.prompt + one.completion for one in held_out),
        summary={"padding_share": batches.padding_share},
    )
