"""Train a model on plain text, or on prompts and completions, and read it before and after.

Examples:
  gpt2mini finetune                                        # a minute, on a bundled story
  gpt2mini finetune --data novel.txt --epochs 3
  gpt2mini finetune --model gpt2 --data books/ --fraction 0.01
  gpt2mini finetune --data answers.jsonl --template alpaca --method lora
  gpt2mini finetune --data more.jsonl --adapter runs/finetune/best      # go on with an adapter
  gpt2mini finetune --data answers.jsonl --reward runs/reward/best      # rated before and after
  gpt2mini finetune --data hf:owner/name:train --columns prompt=question

The data are a file of text or a folder of them; or records of prompts and completions or of
dialogues (.jsonl, .json, .csv, .tsv, .parquet, hf:owner/name:split). Of records the loss counts the
completion and the <|endoftext|> behind it, so that the tuned model stops by itself. Prints
continuations before and after, the loss on data held out, and what the model has forgotten of
general prose; with --reward, how answers to held-out prompts are rated before and after. Writes
metrics.jsonl, summary.json, loss.png and best/, the model or adapter with the lowest validation
loss, to --out.
"""

import math
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch.optim import Optimizer
from tyro.conf import UseAppendAction

from gpt2mini import GPT2
from gpt2mini.checkpoints import holds_adapter
from gpt2mini.cli import common, options
from gpt2mini.cli.data import RECORDS, RecordFlags, holds_records
from gpt2mini.cli.finetune_data import Data, read_data
from gpt2mini.cli.tables import print_rows
from gpt2mini.data.samples import sample
from gpt2mini.lora import load_adapter
from gpt2mini.preferences.comparison import compare_answers
from gpt2mini.preferences.named_rewards import find_reward
from gpt2mini.preferences.reward_functions import RewardFunction
from gpt2mini.training import adamw, evaluate_loss
from gpt2mini.training.distributed import get_world_size

PEAK_RATES = {"full": 5e-5, "last-blocks": 2e-4, "lora": 2e-4}  # small models take ten times these
TEXT = "plain text"
NEW_ADAPTER = "--method lora without --adapter"


@dataclass(frozen=True)
class TextFlags:
    """With plain text."""

    sequence_length: options.Count = 256  # tokens per window
    validation_tokens: options.Count = 65536  # of the text held out, so many are scored


@dataclass(frozen=True)
class ExchangeFlags(RecordFlags):
    """With records: prompts and completions, or dialogues, whose answers are learned."""

    longest: options.Count = 512  # tokens per row, at most
    train_on: Literal["completion", "all"] = "completion"  # all: the prompt too
    packing: bool = True  # short records share rows, and none sees another
    answers: options.CountOrZero = 3  # held-out prompts to answer before and after
    # rates answers: a reward model's folder, toy, or package.module:function
    reward: str | None = None


@dataclass(frozen=True)
class RatingFlags:
    """With --reward."""

    compare: options.Count = 50  # held-out prompts whose answers are rated before and after


@dataclass(frozen=True)
class Flags:
    model: str = "gpt2-nano"  # a model's folder or name
    data: str = str(sample("sample.txt"))  # text, a folder of it, or records
    out: str = "runs/finetune"  # folder for results
    adapter: str | None = None  # folder of an adapter on --model, to go on with it
    # what learns; None: full, or lora with --adapter
    method: Literal["full", "last-blocks", "lora"] | None = None
    fraction: float = 1.0  # seeded share of the data to use
    validation_share: float = options.share_held_out(0.1)  # share that is held out
    held_out: str | None = None  # a file, or a folder of text, to hold out instead
    epochs: options.Positive = 5.0  # times through the data
    steps: options.OptionalCount = None  # optimizer steps; overrides --epochs
    # rows per micro-batch; None: 4 windows, 8 records or 1 row of packed ones
    batch_size: options.OptionalCount = None
    accumulate: options.Count = 1  # micro-batches per step
    lr: options.OptionalPositive = None  # peak learning rate; None: by method and size
    weight_decay: options.OptionalNotNegative = None  # of matrices; None: 0.1, of adapters 0
    # to continue before and after, as it stands; may be given repeatedly
    prompt: UseAppendAction[tuple[str, ...]] = ()
    max_new_tokens: options.Count = 80  # length of the continuations before and after
    text: TextFlags = options.group(TextFlags, TEXT)
    records: ExchangeFlags = options.group(ExchangeFlags, RECORDS)
    rating: RatingFlags = options.group(RatingFlags, "--reward")
    blocks: options.LastBlocks = options.group(options.LastBlocks, "--method last-blocks")
    lora: options.LoRA = options.group(options.LoRA, NEW_ADAPTER)
    run: options.Run = options.group(options.Run)
    parallel: options.Sharding = options.group(options.Sharding)
    machine: options.Machine = options.group(options.Machine)

    @property
    def learns(self) -> str:
        """The method, chosen or usual."""
        return self.method or ("lora" if self.adapter else "full")

    @property
    def conditions(self) -> set[str]:
        found = {
            f"--method {self.learns}",
            RECORDS if holds_records(self.data, self.records.columns) else TEXT,
        }
        if self.learns == "lora" and not self.adapter:
            found.add(NEW_ADAPTER)
        if not self.held_out:
            found.add(options.WITHOUT_HELD_OUT)
        return found | ({"--reward"} if self.records.reward else set())


def run(flags: Flags) -> None:
    job = common.Job(flags, flags.model)
    model, tokenizer = job.load()
    data = read_data(job, tokenizer, model.config.context_length)
    reward = find_rating(job, model)
    choose_what_learns(model, flags)
    learning, total = common.how_many_learn(model)
    per_step = flags.accumulate * get_world_size()
    steps = flags.steps or math.ceil(flags.epochs * len(data.batches) / per_step)
    print(data.description)
    print(f"steps: {steps}, batches per step: {per_step}, on {job.device}")
    print(f"{learning:,} of {total:,} parameters learn: {learning / total:.2%} ({flags.learns})")

    prompts = [*data.prompts, *(data.prompts_to_rate if reward else [])]
    before = common.answer(model, tokenizer, prompts, flags.max_new_tokens, job.seed)
    save = common.how_to_save(model)
    flags.parallel.apply(model, job.precision)
    rows = job.train(
        model,
        data.batches,
        [make_optimizer(model, flags)],
        steps,
        evaluate=lambda: evaluate_loss(model, data.validation(), precision=job.precision),
        save=save,
        accumulate=flags.accumulate,
    )
    if flags.learns != "lora":
        tokenizer.save_pretrained(job.out / "best")
    tuned = job.load_best()
    after = common.answer(tuned, tokenizer, prompts, flags.max_new_tokens, job.seed)
    print_rows(rows, ["loss", "validation_loss"], where="validation_loss")
    shown = len(data.prompts)
    common.print_answers(data.prompts, before[:shown], after[:shown])
    losses = report_losses(rows)
    ratings = report_ratings(flags, data, before[shown:], after[shown:], reward)
    forgotten = job.report_forgetting(
        *(tuned, tokenizer, data.validation(), data.trained_length, data.held_out_text)
    )
    title = f"Fine-tuning {flags.model} on {Path(flags.data).name}"
    summary = {
        "method": flags.learns,
        "trainable_parameters": learning,
        "trainable_share": learning / total,
        "prompts": data.prompts,
        "answers_before": before[:shown],
        "answers_after": after[:shown],
    }
    job.finish(summary | ratings | losses | data.summary | forgotten, title, "nats per token")
    report_best(flags, job.out / "best")


def make_optimizer(model: GPT2, flags: Flags) -> Optimizer:
    """AdamW, with the usual rate and decay for what learns where the flags name none."""
    rate = flags.lr or PEAK_RATES[flags.learns] * (10 if common.is_small(model) else 1)
    usual_decay = 0.0 if flags.learns == "lora" else 0.1
    return adamw(model, rate, usual_decay if flags.weight_decay is None else flags.weight_decay)


def choose_what_learns(model: GPT2, flags: Flags) -> None:
    if not flags.adapter:
        common.choose_what_learns(model, flags.learns, flags.blocks, flags.lora)
    elif flags.learns == "lora":
        load_adapter(model, flags.adapter)
    else:
        raise ValueError(
            f"--method {flags.learns} does not train an adapter: leave it out to go on with "
            f"{flags.adapter}, or --adapter to train the model itself"
        )


def find_rating(job: common.Job, model: GPT2) -> RewardFunction | None:
    """The function that --reward names."""
    name = job.flags.records.reward
    if name is None:
        return None
    sys.path.append(str(Path.cwd()))  # where --reward my_rewards:politeness is looked for
    # an adapter's base must stay as it is
    base = deepcopy(model) if holds_adapter(Path(name)) else None
    return find_reward(name, job.device, base)


def report_ratings(
    flags: Flags, data: Data, before: list[str], after: list[str], reward: RewardFunction | None
) -> dict[str, Any]:
    """Print how the answers to held-out prompts are rated before and after; for the summary."""
    if reward is None:
        return {}
    compared = compare_answers(data.prompts_to_rate, before, after, reward)
    print(f"\n{compared.show(flags.records.answers)}\n{flags.records.reward}: {compared}")
    return {"comparison": compared.summary()}


def report_losses(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Print the validation loss before and at its lowest; the figures for the summary."""
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    first, best = losses[0], common.lowest_loss(rows)
    print(
        f"validation loss {first:.3f} -> {best:.3f} nats per token "
        f"(perplexity {math.exp(first):.1f} -> {math.exp(best):.1f})"
    )
    if best == first:
        print("(no step has lowered it, so best/ is the model as it was: a lower --lr may do)")
    elif not losses[-1] <= best + 0.01:  # nor is NaN
        print(f"(it had risen again to {losses[-1]:.3f} at the end: fewer epochs would do)")
    return {
        "validation_loss_before": first,
        "validation_loss_after": best,
        "perplexity_before": math.exp(first),
        "perplexity_after": math.exp(best),
    }


def report_best(flags: Flags, best: Path) -> None:
    if flags.learns == "lora":
        size = sum(file.stat().st_size for file in best.iterdir())
        print(f"adapter: {best}, {size / 1e6:.2f} MB, in PEFT's format")
        print(f"  gpt2mini generate --model {flags.model} --adapter {best}")
    else:
        print(f"tuned model: {best}   (gpt2mini generate --model {best})")
