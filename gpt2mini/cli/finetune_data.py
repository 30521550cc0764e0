"""What `finetune` learns from: windows of plain text, or prompts and completions."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gpt2mini import Tokenizer
from gpt2mini.cli import common
from gpt2mini.cli.data import holds_records, read_split, shorten
from gpt2mini.cli.text_data import split_text, training_and_held_out_files
from gpt2mini.data.instructions import ExchangeBatches, encode_exchanges, read_exchanges
from gpt2mini.data.text import Batch, TokenBatches, sequential_batches
from gpt2mini.training.distributed import rank_zero_first

# prompts outside the format of the records: what has the tuning left alone?
OUTSIDE = ["It was a dark and stormy night, and", "My dear Mrs. Brown,\n\nI have been"]


@dataclass(frozen=True)
class Data:
    """Plain text or records, ready to be learned."""

    batches: TokenBatches | ExchangeBatches
    validation: Callable[[], Iterable[Batch]]
    description: str
    prompts: list[str]  # to answer before and after
    trained_length: int  # tokens that the model reads at once in training, at most
    summary: dict[str, Any]
    held_out_text: str | None = None  # plain, to measure where the model was not trained
    prompts_to_rate: list[str] = field(default_factory=list)  # held out, with --reward


def read_data(job: common.Job, tokenizer: Tokenizer, context_length: int) -> Data:
    """What the flag --data names."""
    read = read_records if holds_records(job.flags.data, job.flags.records.columns) else read_text
    return read(job, tokenizer, context_length)


def read_text(job: common.Job, tokenizer: Tokenizer, context_length: int) -> Data:
    """Windows of consecutive tokens."""
    flags, seed, size = job.flags, job.seed, job.flags.batch_size or 4
    files = training_and_held_out_files(flags.data, flags.held_out)
    with rank_zero_first():
        split = split_text(
            *(*files, tokenizer, job.out / "tokens"),
            *(flags.fraction, flags.validation_share, seed),
        )
    training, held_out, others = split.training, split.held_out, split.held_out_corpus.tokens
    window = min(flags.text.sequence_length, context_length)
    scored = shorten(held_out, flags.text.validation_tokens)
    beginnings = (document[:5000] for document in held_out[:20])
    texts = [tokenizer.decode(others[d.start : d.stop].tolist()) for d in beginnings]
    first_words = tokenizer.decode(others[held_out[0].start :][:8].tolist())
    return Data(
        batches=TokenBatches(split.corpus.tokens, training, size, window, seed),
        validation=lambda: sequential_batches(others, scored, size, window),
        description=f"{split}\nbatches of {size} x {window} tokens",
        prompts=list(flags.prompt) or [first_words],
        trained_length=window - 1,  # the last token of a window is predicted, not read
        summary={},
        held_out_text="\n\n".join(texts),
    )


def read_records(job: common.Job, tokenizer: Tokenizer, context_length: int) -> Data:
    """Prompts and completions."""
    flags, seed, records = job.flags, job.seed, job.flags.records
    *parts, where = read_split(
        partial(records.read, read=read_exchanges),
        *(flags.data, flags.held_out, lambda exchange: exchange.prompt),
        *(flags.fraction, flags.validation_share, seed),
    )
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
    # with --reward prompts are answered and shown with their rewards instead
    answered = [] if records.reward else [one.prompt for one in held_out[: records.answers]]
    return Data(
        batches=batches,
        validation=validation.in_order,
        description=f"{len(training)} records to learn from, {len(held_out)} held out ({where})\n"
        f"batches of {min(size, len(batches.rows))} x at most {longest} tokens, "
        f"{len(batches)} an epoch ({batches.padding_share:.1%} padding)\nthe loss counts "
        f"{'completions' if records.train_on == 'completion' else 'prompts and completions'}",
        prompts=[*answered, *(flags.prompt or OUTSIDE)],
        trained_length=max(len(one.token_ids) for one in batches.encoded) - 1,
        summary={"padding_share": batches.padding_share},
        prompts_to_rate=[*dict.fromkeys(one.prompt for one in held_out)][: flags.rating.compare],
    )
