"""Make a GPT-2 from nothing but text: learn a vocabulary, then pretrain a model on it.

Examples:
  gpt2mini pretrain                                      # a minute, on the bundled story
  gpt2mini pretrain --data books/ --out runs/nano --steps 5000 --start-layers 3

weights/gpt2-nano was made by this job; its README has the commands. A deep model costs more per
step and learns little more at first: with --start-layers 3 most steps are made with three blocks,
then the model grows to --n-layers without changing its outputs. --init-from starts from an earlier
model; with a larger --n-layers it grows at once.
Writes metrics.jsonl, summary.json, loss.png and best/ to --out.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tyro.conf import Suppress

from gpt2mini import GPT2, GPT2Config, Tokenizer, complete
from gpt2mini.checks import check_predicts_tokens
from gpt2mini.cli import common, options
from gpt2mini.cli.data import shorten
from gpt2mini.cli.tables import print_rows
from gpt2mini.cli.text_data import TextSplit, split_text, training_and_held_out_files
from gpt2mini.data.corpus import read_pieces
from gpt2mini.data.samples import sample
from gpt2mini.data.text import Batch, TokenBatches, sequential_batches
from gpt2mini.surgery import grow_depth
from gpt2mini.tokenizer import train_tokenizer
from gpt2mini.training import evaluate_loss, muon_and_adamw, train, warmup_stable_decay
from gpt2mini.training.distributed import get_rank, rank_zero_first
from gpt2mini.training.growth import train_growing

NEW_MODEL = "a new model, without --init-from"


@dataclass(frozen=True)
class ConfigFlags(GPT2Config):
    """The hyperparameters of a new model."""

    n_layers: Suppress[int] = GPT2Config.n_layers  # a flag with --init-from too, hence of `Flags`


@dataclass(frozen=True)
class GrowthFlags:
    """With --start-layers."""

    grow_at: options.Share = 0.6  # of the steps, after which the model has --n-layers blocks


@dataclass(frozen=True)
class Flags:
    data: str = str(sample("sample.txt"))  # text, or a folder of it: gpt2mini/data/README.md
    out: str = "runs/pretrain"  # folder for results
    init_from: str | None = None  # start from this model's folder, its vocabulary and its width
    fraction: float = 1.0  # seeded share of the text to use
    validation_share: float = options.share_held_out(0.015)  # share that is held out
    held_out: str | None = None  # a file or a folder of text to hold out instead
    validation_tokens: options.Count = 65536  # of these, so many are scored
    steps: options.Count = 40  # optimizer steps
    batch_size: options.Count = 4  # windows per micro-batch
    accumulate: options.Count = 1  # micro-batches per step
    # tokens per window, also in validation; None: the context
    sequence_length: options.OptionalCount = None
    lr: options.Positive = 0.02  # peak rate of Muon, for the matrices of the blocks
    adamw_lr: options.Positive = 0.003  # peak rate of AdamW, for all the rest
    weight_decay: options.NotNegative = 0.01  # of matrices
    warmup_steps: options.CountOrZero = 20  # in which the rate rises
    decay_share: options.Share = 0.3  # of the steps, in which the rate falls
    n_layers: options.OptionalCount = None  # blocks; None: 12, or those of --init-from
    start_layers: options.OptionalCount = None  # blocks of a new model at first; None: --n-layers
    config: ConfigFlags = options.group(
        partial(ConfigFlags, vocab_size=8192, context_length=512, emb_dim=256, n_heads=4), NEW_MODEL
    )
    growth: GrowthFlags = options.group(GrowthFlags, "--start-layers")
    run: options.Run = options.group(partial(options.Run, save_every=200, evaluate_every=200))
    parallel: options.Sharding = options.group(options.Sharding)
    machine: options.Machine = options.group(options.Machine)

    @property
    def conditions(self) -> set[str]:
        holds = {
            NEW_MODEL: not self.init_from,
            "--start-layers": self.start_layers is not None,
            options.WITHOUT_HELD_OUT: not self.held_out,
        }
        return {condition for condition, is_met in holds.items() if is_met}

    @property
    def depth(self) -> int:
        """Blocks of a new model, once it has grown."""
        return self.n_layers or self.config.n_layers


def run(flags: Flags) -> None:
    training = growing(flags)
    job = common.Job(flags, flags.init_from)
    files = training_and_held_out_files(flags.data, flags.held_out)
    with rank_zero_first():
        tokenizer = get_tokenizer(flags, files[0])
        split = split_text(
            *(*files, tokenizer, job.out / "tokens"),
            *(flags.fraction, flags.validation_share, job.seed),
        )
    held_out = HeldOut(split, tokenizer, flags.validation_tokens)
    model = get_model(flags, tokenizer).to(job.device)
    context = model.config.context_length
    length = min(flags.sequence_length or context, context)
    flags.parallel.apply(model, job.precision)
    print(f"{describe(model, flags)}, on {job.device}\n{split}")

    def validate() -> float:
        windows = held_out.windows(flags.batch_size, length)
        return evaluate_loss(model, windows, precision=job.precision)

    rows = job.train(
        model,
        TokenBatches(split.corpus.tokens, split.training, flags.batch_size, length, job.seed),
        muon_and_adamw(model, flags.lr, flags.adamw_lr, flags.weight_decay),
        flags.steps,
        evaluate=validate,
        schedule=partial(
            warmup_stable_decay,
            steps=flags.steps,
            warmup_steps=flags.warmup_steps,
            decay_share=flags.decay_share,
        ),
        training=training,
        accumulate=flags.accumulate,
        log_every=10,
    )
    tokenizer.save_pretrained(job.out / "best")
    report(job, flags, rows, tokenizer, held_out)


def report(
    job: common.Job,
    flags: Flags,
    rows: list[dict[str, Any]],
    tokenizer: Tokenizer,
    held_out: "HeldOut",
) -> None:
    """Print the course of the losses and a sample; write summary.json and the picture."""
    model, generator = job.load_best(), job.generator()
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    best = common.lowest_loss(rows)
    bits = best / math.log(2) / held_out.bytes_per_token()
    text = complete(model, tokenizer, "The ", 100, top_k=50, generator=generator, overflow="slide")
    print_rows(rows, ["loss", "validation_loss"])
    print(f"{text}\n\nvalidation loss {losses[0]:.3f} -> {best:.3f} nats a token")
    print(f"{bits:.3f} bits a byte on the text held out")
    summary = {
        "parameters": common.how_many_learn(model)[1],
        "validation_loss": best,
        "bits_per_byte": bits,
        "sample": text,
    }
    job.finish(summary, f"Pretraining on {Path(flags.data).name}", "nats per token")
    print(f"model: {job.out / 'best'}   (gpt2mini generate --model {job.out / 'best'})")


class HeldOut:
    """What is scored of the text that is held out."""

    def __init__(self, split: TextSplit, tokenizer: Tokenizer, most_tokens: int) -> None:
        self.tokens, self.tokenizer = split.held_out_corpus.tokens, tokenizer
        self.documents = shorten(split.held_out, most_tokens)

    def windows(self, batch_size: int, context_length: int) -> Iterable[Batch]:
        return sequential_batches(self.tokens, self.documents, batch_size, context_length)

    def bytes_per_token(self) -> float:
        """Mean length of the predicted tokens; it turns a loss per token into one per byte."""
        targets = [int(i) for one in self.documents for i in self.tokens[one.start + 1 : one.stop]]
        lengths = [
            len(self.tokenizer.token_bytes(i)) for i in targets if i != self.tokenizer.eos_id
        ]
        return sum(lengths) / len(targets)


def get_tokenizer(flags: Flags, files: list[Path]) -> Tokenizer:
    """The vocabulary of an earlier model or of this run, or a new one learned from the text."""
    folder = Path(flags.init_from or Path(flags.out) / "tokenizer")
    if flags.init_from or (flags.run.resume and folder.is_dir()) or get_rank() > 0:
        return Tokenizer.from_pretrained(folder)
    pieces = (piece for file in files for piece, _ in read_pieces(file))
    tokenizer = train_tokenizer(pieces, flags.config.vocab_size, show_progress=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def get_model(flags: Flags, tokenizer: Tokenizer) -> GPT2:
    if flags.init_from:
        model = GPT2.from_pretrained(flags.init_from)
        check_predicts_tokens(model)
        grow_depth(model, flags.n_layers or model.config.n_layers)
        return model
    n_layers = flags.start_layers or flags.depth
    own = {"vocab_size": tokenizer.vocab_size, "n_layers": n_layers}
    return GPT2(GPT2Config(**vars(flags.config) | own))


def growing(flags: Flags) -> Callable[..., list[dict[str, Any]]]:
    """How to train: with all blocks, or with few at first. Raises ValueError for flags that do not
    fit each other."""
    n_layers, start = flags.depth, flags.start_layers
    if start is None:
        return train
    if flags.init_from:
        raise ValueError(f"--start-layers is for {NEW_MODEL}")
    if start == n_layers:
        return train
    if n_layers % start:
        raise ValueError(f"--n-layers {n_layers} must be a multiple of --start-layers {start}")
    grow_step = round(flags.growth.grow_at * flags.steps)
    if not 1 <= grow_step < flags.steps:
        raise ValueError(
            f"--grow-at {flags.growth.grow_at:g} of {flags.steps} steps is step {grow_step}: it "
            "must lie between the first and the last"
        )
    if flags.parallel.shard:
        raise ValueError("a sharded model cannot grow: leave out --shard or --start-layers")
    return partial(train_growing, n_layers=n_layers, grow_step=grow_step)


def describe(model: GPT2, flags: Flags) -> str:
    """For example "3,018,496 parameters in 1 of 12 blocks, 8,192 kinds of token"."""
    _, parameters = common.how_many_learn(model)
    kinds, now = model.config.vocab_size, model.config.n_layers
    blocks = f"{now} of {flags.depth} blocks" if flags.start_layers else f"{now} blocks"
    return f"{parameters:,} parameters in {blocks}, {kinds:,} kinds of token"
