"""Perplexity tasks on a long text: WikiText, enwik8, text8, or a file of your own."""

import codecs
import math
from pathlib import Path

from gpt2mini.evaluation.detokenizers import count_wikitext_tokens, detokenize_wikitext
from gpt2mini.evaluation.perplexity import Perplexity, exponential, perplexity
from gpt2mini.evaluation.table import PAPER, Options, Row
from gpt2mini.evaluation.windows import check_window
from gpt2mini.model import GPT2
from gpt2mini.tokenizer import Tokenizer


def wikitext(
    model: GPT2, tokenizer: Tokenizer, path: Path, options: Options, task: str
) -> list[Row]:
    """Perplexity per original token: the nats of the de-tokenized text, divided by the number of
    tokens in the file, not of GPT-2's (Radford et al. 2019, section 3.1)."""
    text = read_text(path, options.limit)
    found = measure(model, tokenizer, detokenize_wikitext(text), options)
    tokens = count_wikitext_tokens(text)
    value = exponential(found.nats / tokens)
    setting = f"{describe_window(model, options)}, de-tokenized, per original token"
    return [Row(task, "perplexity", value, tokens, "tokens", setting, PAPER[task])]


def bits(model: GPT2, tokenizer: Tokenizer, path: Path, options: Options, task: str) -> list[Row]:
    """Bits per byte (enwik8) or per character (text8) of the file as it is. The paper does not say
    which part it used; the usual test set is the last 5 MB."""
    text = read_text(path, options.limit)
    found = measure(model, tokenizer, text, options)
    setting = f"{describe_window(model, options)}, the file as it is"
    if task == "enwik8":
        value, count, unit = found.bits_per_byte, found.bytes, "byte"
    else:
        value, count, unit = found.nats / math.log(2) / len(text), len(text), "character"
    return [Row(task, f"bits per {unit}", value, count, f"{unit}s", setting, PAPER[task])]


def any_text(model: GPT2, tokenizer: Tokenizer, path: Path, options: Options) -> list[Row]:
    """Perplexity per token and word, bits per byte and character, of a file of your own."""
    text = read_text(path, options.limit)
    found = measure(model, tokenizer, text, options)
    setting = describe_window(model, options)
    per_character = found.nats / math.log(2) / len(text)
    return [
        Row(path.name, metric, value, count, counted, setting)
        for metric, value, count, counted in (
            ("perplexity per token", found.per_token, found.tokens, "tokens"),
            ("perplexity per word", found.per_word, found.words, "words"),
            ("bits per byte", found.bits_per_byte, found.bytes, "bytes"),
            ("bits per character", per_character, len(text), "characters"),
        )
    ]


def measure(model: GPT2, tokenizer: Tokenizer, text: str, options: Options) -> Perplexity:
    if not text.strip():
        raise ValueError("the text is only white space")
    return perplexity(
        model,
        tokenizer,
        text,
        options.context_length,
        options.stride,
        options.batch_size,
        precision=options.precision,
        progress=options.progress,
    )


def describe_window(model: GPT2, options: Options) -> str:
    length = check_window(model, options.context_length, options.stride)
    windows = "rolling windows" if options.stride is None else f"stride {options.stride}"
    return f"context {length}, {windows}"


def read_text(path: Path, limit: int | None) -> str:
    """The text of a UTF-8 file, or its first `limit` thousand characters up to the end of a line.

    An incomplete character at the end, as in files cut after a number of bytes, is dropped.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(path.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if not text:
        raise ValueError(f"{path} is empty: there is nothing to score")
    if limit is not None and len(text) > 1000 * limit:
        end = text.find("\n", 1000 * limit, 1000 * limit + 10_000) + 1
        text = text[: end or 1000 * limit]
    return text
